// sm80.cuh - operand tiles in shared memory and the warp product of mma.sync, for 16-bit and 32-bit elements.
//
// A stage holds 64 bytes of K (32 halves or 16 floats) of 128 rows of MN. Lines are 16-byte chunks:
//   K-major   row mn of 64 bytes; chunk c at c ^ ((mn >> 1) & 3): the 8 rows of an ldmatrix fall into 8 different chunks
//   MN-major  row k of 128 elements; halves: chunk c at c ^ (k & 7), read by ldmatrix.trans
//             floats: chunk c at c ^ 2 (k & 3), read word by word: 4 k x 8 mn are 32 different banks
//
// Float operands are split into two TF32 numbers, x = high + low exactly to 2^-23: high high + high low + low high keeps fp32's
// accuracy at a third of the TF32 rate. GemmParams.reserved = 1 asks for the first product alone (torch's "high").
#pragma once
#include "logitless/mma/sm90.cuh"
#include "logitless/ptx/mma.cuh"

namespace logitless {

template <class Element, int kMajor, int kRows>
struct Sm80Operand {
  static constexpr int kSize = Element::kBytes;
  static constexpr int kDepthElements = 64 / kSize;  // K of a stage
  static constexpr int kBytes = kRows * 64;
  static constexpr int kLine = kMajor == kMajorK ? 64 : kRows * kSize;  // bytes of a row in shared memory
  static constexpr int kPerChunk = 16 / kSize;

  static __device__ __forceinline__ u32 at(int row, int chunk) {
    const int mixed = kMajor == kMajorK ? chunk ^ ((row >> 1) & 3) : kSize == 2 ? chunk ^ (row & 7) : chunk ^ (2 * (row & 3));
    return row * kLine + mixed * 16;
  }

  // The thread's share of a stage: operand as stored, `inner` elements of the contiguous dimension and `outer` of the other exist.
  template <int kThreads>
  static __device__ __forceinline__ void load(u32 dst, const void* x, i64 pitch, int outer0, int inner0, int outer, int inner,
                                              int thread) {
    constexpr int kChunks = kLine / 16;
#pragma unroll
    for (int i = 0; i < kBytes / 16 / kThreads; i++) {
      const int id = thread + i * kThreads, row = id / kChunks, chunk = id % kChunks;
      const int o = outer0 + row, e = inner0 + chunk * kPerChunk;
      const int live = o < outer ? min(max(inner - e, 0), kPerChunk) : 0;
      const char* src = static_cast<const char*>(x) + (live ? (o * pitch + e) * kSize : 0);
      ptx::copy_async(dst + at(row, chunk), src, live * kSize);
    }
  }

  // Fragments of step s (32 bytes of K): of 16 rows as the left operand, or of two groups of 8 rows as the right one.
  static __device__ __forceinline__ void left(u32 (&r)[4], u32 base, int row, int s, int lane) {
    if (kMajor == kMajorK) {
      ptx::ldmatrix_x4(r, base + at(row + (lane & 15), 2 * s + (lane >> 4)));
    } else if (kSize == 2) {  // matrices: (m 0-7, k 0-7), (m 8-15, k 0-7), (m 0-7, k 8-15), (m 8-15, k 8-15)
      ptx::ldmatrix_x4_transposed(r, base + at(16 * s + (lane & 7) + 8 * (lane >> 4), row / 8 + ((lane >> 3) & 1)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = word(base, row + (lane >> 2) + 8 * (i & 1), 8 * s + (lane & 3) + 4 * (i >> 1));
    }
  }
  static __device__ __forceinline__ void right(u32 (&r)[4], u32 base, int row, int s, int lane) {
    if (kMajor == kMajorK) {  // (n 0-7, k low), (n 0-7, k high), (n 8-15, k low), (n 8-15, k high)
      ptx::ldmatrix_x4(r, base + at(row + (lane & 7) + 8 * (lane >> 4), 2 * s + ((lane >> 3) & 1)));
    } else if (kSize == 2) {
      ptx::ldmatrix_x4_transposed(r, base + at(16 * s + (lane & 15), row / 8 + (lane >> 4)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = word(base, row + (lane >> 2) + 8 * (i >> 1), 8 * s + (lane & 3) + 4 * (i & 1));
    }
  }
  static __device__ __forceinline__ u32 word(u32 base, int mn, int k) {
    return ptx::load_shared(base + at(k, mn / 4) + (mn % 4) * 4);
  }
};

// acc[16 rows][16 columns] += left right^T over one step, fragments as above.
template <class Element>
struct Sm80Mma;

template <>
struct Sm80Mma<Bf16> {
  static __device__ __forceinline__ void mma(float* d, const u32 (&a)[4], const u32 (&b)[4], bool) {
    ptx::mma_bf16(d, a, b[0], b[1]);
    ptx::mma_bf16(d + 4, a, b[2], b[3]);
  }
};
template <>
struct Sm80Mma<F16> {
  static __device__ __forceinline__ void mma(float* d, const u32 (&a)[4], const u32 (&b)[4], bool) {
    ptx::mma_f16(d, a, b[0], b[1]);
    ptx::mma_f16(d + 4, a, b[2], b[3]);
  }
};
template <>
struct Sm80Mma<F32> {
  static __device__ __forceinline__ void split(const u32 (&x)[4], u32 (&high)[4], u32 (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      high[i] = ptx::round_tf32(x[i]);
      low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
  }
  static __device__ __forceinline__ void mma(float* d, const u32 (&a)[4], const u32 (&b)[4], bool single) {
    u32 ah[4], al[4], bh[4], bl[4];
    split(a, ah, al);
    split(b, bh, bl);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (!single) {  // small products first
        ptx::mma_tf32(d + 4 * j, al, bh[2 * j], bh[2 * j + 1]);
        ptx::mma_tf32(d + 4 * j, ah, bl[2 * j], bl[2 * j + 1]);
      }
      ptx::mma_tf32(d + 4 * j, ah, bh[2 * j], bh[2 * j + 1]);
    }
  }
};

}  // namespace logitless
