// half.cuh - the two 16-bit formats, as tags that the products and the stores share.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

struct Bf16 {
  static __device__ __forceinline__ u32 pack(float low, float high) {  // round to nearest even
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
  static __device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
};

struct F16 {
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  static __device__ __forceinline__ float low(u32 x) {
    float r;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}\n" : "=f"(r) : "r"(x));
    return r;
  }
  static __device__ __forceinline__ float high(u32 x) {
    float r;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, h;\n}\n" : "=f"(r) : "r"(x));
    return r;
  }
};

}  // namespace logitless
