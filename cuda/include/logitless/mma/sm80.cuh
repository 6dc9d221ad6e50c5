// sm80.cuh - operand tiles in shared memory and the warp product of mma.sync, for 16-bit and 32-bit
// elements.
//
// A stage holds 64 bytes of K (32 halves or 16 floats) of kRows rows of MN, in chunks of 16 bytes:
//   K-major   row mn of 64 bytes; chunk c at c ^ ((mn >> 1) & 3): the 8 rows of an ldmatrix fall
//             into 8 different chunks
//   MN-major  row k of kRows elements; halves: chunk c at c ^ (k & 7), read by ldmatrix.trans;
//             floats: chunk c at c ^ 2 (k & 3), read word by word: 4 k x 8 mn are 32 banks
//
// Float operands are split into two TF32 numbers, x = high + low to 2^-24: high high + high low +
// low high keeps fp32's accuracy at a third of the TF32 rate. The tensor core truncates when it
// adds to an accumulator (3e-5 relative at K = 5000), so the products of a stage, 16 of K, start
// from zero and are added to the accumulators by ordinary rounded additions: 4e-7 there, below an
// fp32 cuBLAS. GemmParams.reserved = 1 asks for the first product alone (torch's "high").
#pragma once
#include "logitless/mma/sm90.cuh"
#include "logitless/params.cuh"
#include "logitless/ptx/mma.cuh"

namespace logitless {

template <class Element, int kMajor, int kRows>
struct Sm80Operand {
  static constexpr int kSize = Element::kBytes;
  static constexpr int kBytes = kRows * 64;
  static constexpr int kLine =
      kMajor == kMajorK ? 64 : kRows * kSize;  // bytes of a row in shared memory
  static constexpr int kPerChunk = 16 / kSize;

  static __device__ __forceinline__ u32 at(int row, int chunk) {
    const int mixed = kMajor == kMajorK ? chunk ^ ((row >> 1) & 3)
                      : kSize == 2      ? chunk ^ (row & 7)
                                        : chunk ^ (2 * (row & 3));
    return row * kLine + mixed * 16;
  }

  // The operand without its first k of K; a multiple of 16 bytes of them.
  static __device__ __forceinline__ const void* from(const void* x, i64 pitch, int k) {
    return static_cast<const char*>(x) + k * (kMajor == kMajorK ? kSize : pitch * kSize);
  }

  // Global to shared: each thread copies the same chunk of kPasses lines, whose swizzle is the
  // same.
  template <int kThreads>
  struct Loader {
    static constexpr int kChunks = kLine / 16, kLines = kThreads / kChunks,
                         kPasses = kBytes / 16 / kThreads;
    static_assert(kLines % 8 == 0, "a pass keeps the swizzle");
    const char* source;  // of pass 0 and k = 0
    i64 step;            // bytes from a pass to the next
    u32 target;
    int line;     // K-major: live lines, a bit each; MN-major: first k
    int inner;    // elements from this chunk to the end of the line
    i64 advance;  // bytes of one element of k

    // `rows` of MN and `depth` of K exist; mn: first row of the tile.
    __device__ __forceinline__ Loader(const void* x, i64 pitch, int mn, int rows, int depth,
                                      int thread) {
      const int l = thread / kChunks, chunk = thread % kChunks;
      target = at(l, chunk);
      step = pitch * kLines * kSize;
      if (kMajor == kMajorK) {
        line = 0;
#pragma unroll
        for (int i = 0; i < kPasses; i++) line |= (mn + l + i * kLines < rows ? 1 : 0) << i;
        inner = depth - chunk * kPerChunk;
        advance = kSize;
        source = static_cast<const char*>(x) +
                 (static_cast<i64>(mn + l) * pitch + chunk * kPerChunk) * kSize;
      } else {
        line = l;
        inner = min(max(rows - mn - chunk * kPerChunk, 0), kPerChunk) * kSize;
        advance = pitch * kSize;
        source = static_cast<const char*>(x) + (l * pitch + mn + chunk * kPerChunk) * kSize;
      }
    }
    __device__ __forceinline__ void load(u32 stage, int k, int depth) const {
      const char* from = source + k * advance;
      const int live = min(max(inner - k, 0), kPerChunk) * kSize;  // K-major
#pragma unroll
      for (int i = 0; i < kPasses; i++) {
        const int bytes = kMajor == kMajorK ? ((line >> i) & 1 ? live : 0)
                                            : (k + line + i * kLines < depth ? inner : 0);
        ptx::copy_async(stage + target + i * kLines * kLine, from + i * step, bytes);
      }
    }
  };

  // Shared to registers.
  // Fragment i (16 rows of MN) of step s (32 bytes of K). `lane_offset` is computed once a kernel:
  // what i and s add to it is a constant, or flips bits that nothing else touches.
  static __device__ __forceinline__ u32 left_offset(int row, int lane) {
    if (kMajor == kMajorK) return at(row + (lane & 15), lane >> 4);
    if (kSize == 2) return at((lane & 7) + 8 * (lane >> 4), row / 8 + ((lane >> 3) & 1));
    return row;  // floats: addressed word by word
  }
  static __device__ __forceinline__ u32 right_offset(int row, int lane) {
    if (kMajor == kMajorK) return at(row + (lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1);
    if (kSize == 2) return at(lane & 15, row / 8 + (lane >> 4));
    return row;
  }
  // left: matrices (mn 0-7, k low), (mn 8-15, k low), (mn 0-7, k high), (mn 8-15, k high); right:
  // low and high of mn 0-7 first.
  template <bool kLeft>
  static __device__ __forceinline__ void fragment(u32 (&r)[4], u32 base, u32 lane_offset, int i,
                                                  int s, int lane) {
    if (kMajor == kMajorK) {
      ptx::ldmatrix_x4(r, base + (lane_offset ^ (32 * s)) + i * 16 * kLine);
    } else if (kSize == 2) {
      ptx::ldmatrix_x4_transposed(r, base + (lane_offset ^ (32 * i)) + s * 16 * kLine);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int high_row = kLeft ? j & 1 : j >> 1, high_k = kLeft ? j >> 1 : j & 1;
        const int mn = lane_offset + 16 * i + (lane >> 2) + 8 * high_row,
                  k = 8 * s + (lane & 3) + 4 * high_k;
        r[j] = ptx::load_shared(base + at(k, mn / 4) + (mn % 4) * 4);
      }
    }
  }
};

// acc[M fragments of 16 rows][N fragments of 16 columns] += left right^T over one step.
struct HalfFragment {
  u32 bits[4];
};

template <class Element>
struct Sm80Mma {
  using Fragment = HalfFragment;
  static constexpr bool kSeparate = false;

  template <int kM, int kN>
  static __device__ __forceinline__ void product(float (&acc)[kM][8 * kN], const Fragment (&a)[kM],
                                                 const Fragment (&b)[kN], bool, bool) {
#pragma unroll
    for (int i = 0; i < kM; i++)
#pragma unroll
      for (int j = 0; j < 2 * kN; j++) {
        const u32* right = b[j / 2].bits + 2 * (j % 2);
        if (Element::kIsBf16) ptx::mma_bf16(&acc[i][4 * j], a[i].bits, right[0], right[1]);
        else ptx::mma_f16(&acc[i][4 * j], a[i].bits, right[0], right[1]);
      }
  }
};

template <>
struct Sm80Mma<F32> {
  using Fragment = HalfFragment;  // as loaded; split once a step, not once a product
  static constexpr bool kSeparate = true;

  struct Split {
    u32 high[4], low[4];
    __device__ __forceinline__ explicit Split(const u32 (&x)[4]) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        high[i] = ptx::round_tf32(x[i]);
        low[i] = ptx::round_tf32(__float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i])));
      }
    }
  };

  // first: acc is overwritten.
  template <int kM, int kN>
  static __device__ __forceinline__ void product(float (&acc)[kM][8 * kN], const Fragment (&a)[kM],
                                                 const Fragment (&b)[kN], bool single, bool first) {
    const float zero[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kM; i++) {
      const Split left(a[i].bits);
#pragma unroll
      for (int j = 0; j < kN; j++) {
        const Split right(b[j].bits);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* d = &acc[i][8 * j + 4 * h];
          ptx::mma_tf32(d, first ? zero : d, left.high, right.high[2 * h], right.high[2 * h + 1]);
          if (single) continue;
          ptx::mma_tf32(d, d, left.low, right.high[2 * h], right.high[2 * h + 1]);
          ptx::mma_tf32(d, d, left.high, right.low[2 * h], right.low[2 * h + 1]);
        }
      }
    }
  }
};

}  // namespace logitless
