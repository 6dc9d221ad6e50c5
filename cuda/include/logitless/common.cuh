// common.cuh - element types, row views and warp sums for the kernels around the products. No CUDA
// header is included.
#pragma once
#include "logitless/params.cuh"
#include "logitless/ptx/grid.cuh"
#include "logitless/types.cuh"

namespace logitless {

// -- kernels ------------------------------------------------------------------------------------
// What a kernel does first: it lets the one that follows come onto the device, and waits for the
// one ahead. The host launches them with Start::Beside behind one another (rust/gpu/src/launch.rs),
// so that none pays for another's launch; what follows waits too, so that nothing ever runs beside
// what it reads or overwrites.
__device__ __forceinline__ void take_turn() {
  ptx::launch_dependents();
  ptx::wait_for_grid_ahead();
}

// KERNEL(name, Params, threads) { body }: a kernel of one parameter struct, `p`, that takes its
// turn.
#define KERNEL(name, Params, ...)                                      \
  static __device__ __forceinline__ void name##_body(const Params& p); \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__)            \
      name(const __grid_constant__ Params p) {                         \
    take_turn();                                                       \
    name##_body(p);                                                    \
  }                                                                    \
  static __device__ __forceinline__ void name##_body(const Params& p)

// -- element types ------------------------------------------------------------------------------
// Codes are those of the binding: 0 f32, 1 f64, 2 bf16, 3 f16.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float widen(f16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}

template <class T>
struct Element;
template <>
struct Element<float> {
  using Acc = float;
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <>
struct Element<double> {
  using Acc = double;
  static __device__ __forceinline__ double from(double x) { return x; }
};
template <>
struct Element<bf16> {
  using Acc = float;
  static __device__ __forceinline__ bf16 from(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
  }
};
template <>
struct Element<f16> {
  using Acc = float;
  static __device__ __forceinline__ f16 from(float x) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
  }
};

// An element of a tensor whose type is known only to the host (bias, dense targets).
template <class Acc>
__device__ __forceinline__ Acc load_any(const void* p, int dtype, i64 at) {
  switch (dtype) {
    case 0:
      return (Acc)((const float*)p)[at];
    case 1:
      return (Acc)((const double*)p)[at];
    case 2:
      return (Acc)widen(((const bf16*)p)[at]);
    default:
      return (Acc)widen(((const f16*)p)[at]);
  }
}
template <class Acc>
__device__ __forceinline__ void store_any(void* p, int dtype, i64 at, Acc x) {
  switch (dtype) {
    case 0:
      ((float*)p)[at] = (float)x;
      break;
    case 1:
      ((double*)p)[at] = (double)x;
      break;
    case 2:
      ((bf16*)p)[at] = Element<bf16>::from((float)x);
      break;
    default:
      ((f16*)p)[at] = Element<f16>::from((float)x);
      break;
  }
}

template <class Acc>
__device__ __forceinline__ Acc infinite();
template <>
__device__ __forceinline__ float infinite<float>() {
  return __int_as_float(0x7f800000);
}
template <>
__device__ __forceinline__ double infinite<double>() {
  return __longlong_as_double(0x7ff0000000000000ll);
}
template <class Acc>
__device__ __forceinline__ Acc not_a_number() {
  return infinite<Acc>() - infinite<Acc>();
}

__device__ __forceinline__ bool is_nan(float x) { return x != x; }
__device__ __forceinline__ bool is_nan(double x) { return x != x; }

// -- sums in a fixed order ----------------------------------------------------------------------
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(kFullWarp, x, o);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const T y = __shfl_xor_sync(kFullWarp, x, o);
    x = y > x || is_nan(y) ? y : x;
  }
  return x;
}

// -- memory -------------------------------------------------------------------------------------
// load(i), then use(i, x), for i = first, first + step ... below end, kBatch loads in flight: a
// loop that uses one before it asks for the next waits for memory every time, and an unrolled one
// does so for what is left over. Past the end the last one is asked for again, which costs less
// than a branch between loads.
template <int kBatch, class Load, class Use>
__device__ __forceinline__ void in_batches(int first, int step, int end, Load&& load, Use&& use) {
#pragma unroll 1
  for (; first < end; first += kBatch * step) {
    decltype(load(0)) x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) x[i] = load(min(first + i * step, end - 1));
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (first + i * step < end) use(first + i * step, x[i]);
  }
}

// -- logits -------------------------------------------------------------------------------------
// z = softcap tanh((scale dot + bias) / softcap); softcap 0 means none.
__device__ __forceinline__ float logit_map(float dot, float scale, float bias, float softcap) {
  const float x = fmaf(scale, dot, bias);
  return softcap > 0.f ? softcap * tanhf(x / softcap) : x;
}
__device__ __forceinline__ double logit_map(double dot, double scale, double bias, double softcap) {
  const double x = fma(scale, dot, bias);
  return softcap > 0. ? softcap * tanh(x / softcap) : x;
}

// -- rows ---------------------------------------------------------------------------------------
__device__ __forceinline__ int live_count(const RowList& list) {
  return list.count ? *list.count : (int)list.total;
}
__device__ __forceinline__ i64 row_at(const RowList& list, int slot) {
  return list.rows ? list.rows[slot] : slot;
}

// Slots that a packed buffer defines: the live ones, and zeros to the end of their block of 256
// rows, which products read.
__device__ __forceinline__ int zeroed_rows(int count, int padded) {
  return min(padded, (count + 255) / 256 * 256);
}

// Ints of a list of blocks of 256 slots: their number, their indices, a flag for each block.
__device__ __forceinline__ int gate_length(const RowList& list) {
  return 1 + 2 * (int)((list.total + 255) / 256);
}

// Row i of a view. Rows are counted in 31 bits: a division of 64 would take longer than a load.
template <class T>
__device__ __forceinline__ const T* row_of(const RowView& v, i64 i) {
  const u32 inner = (u32)v.inner, outer = (u32)i / inner;
  return (const T*)v.data + outer * v.outer_stride + ((u32)i - outer * inner) * v.inner_stride;
}

// Row kernels that only move give a row to each warp of their blocks of 256: a block a row is
// mostly idle below 2048 features, and starts cost more than the copy.
__device__ __forceinline__ i64 row_of_warp() { return blockIdx.x * 8ll + threadIdx.x / 32; }

// Eight elements at once, as 16-byte accesses.
template <class T>
struct alignas(16) Pack {
  T x[8];
};
__device__ __forceinline__ bool is_aligned(const void* x) { return (u64)x % 16 == 0; }

}  // namespace logitless
