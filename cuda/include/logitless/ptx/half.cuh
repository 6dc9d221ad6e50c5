// half.cuh - operand formats as tags that the products and the stores share.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

struct Bf16 {
  static constexpr int kBytes = 2;
  static constexpr bool kIsBf16 = true;
  static __device__ __forceinline__ u32 pack(float low, float high) {  // round to nearest even
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  // Elements at and at + 1 of an array, as they lie there, and as floats; `at` is even.
  using Pair = u32;
  static __device__ __forceinline__ Pair load(const void* x, long long at) {
    return __ldg(reinterpret_cast<const u32*>(static_cast<const u16*>(x) + at));
  }
  static __device__ __forceinline__ float2 widen(Pair v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  }
};

struct F16 {
  static constexpr int kBytes = 2;
  static constexpr bool kIsBf16 = false;
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  using Pair = u32;
  static __device__ __forceinline__ Pair load(const void* x, long long at) {
    return __ldg(reinterpret_cast<const u32*>(static_cast<const u16*>(x) + at));
  }
  static __device__ __forceinline__ float2 widen(Pair v) {
    float2 r;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
        : "=f"(r.x), "=f"(r.y)
        : "r"(v));
    return r;
  }
};

struct F32 {  // mma.sync only, as two or three TF32 products
  static constexpr int kBytes = 4;
  using Pair = float2;
  static __device__ __forceinline__ Pair load(const void* x, long long at) {
    return __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(x) + at));
  }
  static __device__ __forceinline__ float2 widen(Pair v) { return v; }
};

}  // namespace logitless
