// types.cuh - integer names and compile-time codes. No CUDA or standard header is included
// anywhere: NVRTC needs only this tree.
#pragma once

namespace logitless {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kFullWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace logitless
