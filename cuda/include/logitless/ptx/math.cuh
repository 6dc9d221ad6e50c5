// math.cuh - the arithmetic instructions the epilogues lean on.
#pragma once
#include "logitless/types.cuh"

namespace logitless::ptx {

__device__ __forceinline__ float exp2(float x) {  // 2 ulp, flushes below 2^-126; exp2(-inf) = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {  // 1 ulp; 1/inf = 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh of half of x ln 2 = 1 - 2 / (1 + 2^x): error 2e-7 absolute (tanh.approx: 5e-4, i.e. 0.015
// nats under a softcap of 30), right at +-inf.
__device__ __forceinline__ float tanh(float x) {
  return fmaf(-2.f, reciprocal(1.f + exp2(x)), 1.f);
}

// The same of x and y. A pair shares one reciprocal, 1/a = b / (a b), because three special-function
// instructions a logit are what a softcap's epilogue waits for. 4e-7 absolute; a nan in one is one
// in both.
__device__ __forceinline__ void tanh_pair(float& x, float& y) {
  float a, b;
  asm("min.NaN.f32 %0, %1, 0f42700000;" : "=f"(a) : "f"(x));  // 60: the square of 2^60 is finite
  asm("min.NaN.f32 %0, %1, 0f42700000;" : "=f"(b) : "f"(y));
  a = 1.f + exp2(a);
  b = 1.f + exp2(b);
  const float r = -2.f * reciprocal(a * b);
  x = fmaf(r, b, 1.f);
  y = fmaf(r, a, 1.f);
}

// if (choose) a += x; else b += y; as two predicated adds (the compiler would select four operands,
// or branch).
__device__ __forceinline__ void add_either(bool choose, float& a, float x, float& b, float y) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n@p add.f32 %0, %0, %2;\n@!p add.f32 %1, %1, "
      "%3;\n}\n"
      : "+f"(a), "+f"(b)
      : "f"(x), "f"(y), "r"(static_cast<u32>(choose)));
}

__device__ __forceinline__ void prefetch(const void* line) {  // into the L2
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

__device__ __forceinline__ float quad_sum(
    float x) {  // the four lanes that share a row of a fragment
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ int quad_min(int x) {
  x = min(x, __shfl_xor_sync(kFullWarp, x, 1));
  return min(x, __shfl_xor_sync(kFullWarp, x, 2));
}

}  // namespace logitless::ptx
