// targets.cuh - the targets' part of a gradient, added to the accumulators in float.
//
// Off its target a row's gradient of the logits is a probability; at it, it is the largest entry by
// far. A product over half-precision gradients rounds that entry, and the scaled row beside it: dE
// and dW then miss the floor of a 16-bit result (1.7e-3) by 40 to 70%. So the stored exponentials
// are 0 at the target, and what belongs there is added here, once, from operands as they came:
//   RowTargets     dE[i] += g[i] W[target[i]]               every row has one at most
//   ClassTargets   dW[c] += sum of g[e] E[rows[e]]          the rows whose target is c, in a list
// Sums are made in a fixed order, so the same input gives the same bits.
#pragma once
#include "logitless/epilogue/band.cuh"

namespace logitless {

struct NoTargets {
  static constexpr bool kAhead = false;
  static constexpr bool kPlaces = false;
  template <class Half, int kColumns>
  static __device__ __forceinline__ void add(float (&)[kColumns / 2], const Band&) {}
};

// acc += g * row of onehot_w, in one half of the band's rows. 4 bytes a load: the quad's lanes take
// 16 bytes of the row. kWhole: every column exists. A load behind a branch of its own waits for the
// one before, and the tile for 32 trips to memory instead of one (17% of dW).
template <class Half, int kColumns, bool kWhole>
__device__ __forceinline__ void add_row(float (&acc)[kColumns / 2], const Band& band, int half,
                                        i64 row, float g) {
  const int column = band.my_column();
  const i64 at = row * band.p.onehot_ld + column;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j++) {
    if (!kWhole && column + 8 * j >= band.p.n) continue;
    const float2 x = Half::widen(Half::load(band.p.onehot_w, at + 8 * j));
    acc[4 * j + 2 * half] = fmaf(g, x.x, acc[4 * j + 2 * half]);
    acc[4 * j + 2 * half + 1] = fmaf(g, x.y, acc[4 * j + 2 * half + 1]);
  }
}

struct RowTargets {
  static constexpr bool kAhead = false;
  static constexpr bool kPlaces = true;
  template <class Half, int kColumns>
  static __device__ __forceinline__ void add(float (&acc)[kColumns / 2], const Band& band) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int y = band.p.onehot_g && band.live(half)
                        ? __ldg(band.p.target + band.my_row(half))
                        : -1;
      if (y >= 0)
        add_row<Half, kColumns, false>(acc, band, half, y,
                                       __ldg(band.p.onehot_g + band.my_row(half)));
    }
  }
};

struct ClassTargets {
  static constexpr bool kAhead = true;
  static constexpr bool kPlaces = false;

  // Lists of so many entries were summed beforehand (store.cu: sum_lists): a frequent token has
  // hundreds of rows, and the tile would wait for the warp that walks them. The whole warp adds those
  // sums (or makes them, where there are none), and all lists of a tile that reaches past the last
  // column; shorter ones are for the quad whose class it is.
  static constexpr int kSummed = 16;

  // The entries of a class, and whether their sum is all that is needed.
  struct List {
    int first, last;
    bool summed;
  };
  static __device__ __forceinline__ List list_of(const GemmParams& p, int row) {
    const int first = __ldg(p.onehot_start + row), last = __ldg(p.onehot_start + row + 1);
    return {first, last, p.onehot_sums && last - first >= kSummed};
  }
  static __device__ __forceinline__ const float* sum_of(const GemmParams& p, const List& list) {
    return p.onehot_sums + static_cast<i64>(list.first / kSummed) * p.n;
  }

  // Brings what `add` will read of the band into the L1 (lists) and the L2 (rows: a lane takes 128
  // bytes of an entry's, or every fourth 128 of a sum's).
  template <int kColumns>
  static __device__ __forceinline__ void ahead(const Band& band) {
    const GemmParams& p = band.p;
    if (!p.onehot_start) return;
    const int part = 64 * (band.lane & 3), column = band.column + part;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      if (!band.live(half)) return;
      const List list = list_of(p, band.my_row(half));
      if (list.summed) {
        for (int at = 32 * (band.lane & 3); at < kColumns && band.column + at < p.n; at += 128)
          ptx::prefetch(sum_of(p, list) + band.column + at);
      } else if (part < kColumns && column < p.n) {
        for (int e = list.first; e < list.last; e++)
          ptx::prefetch(static_cast<const u16*>(p.onehot_w) +
                        __ldg(p.onehot_rows + e) * p.onehot_ld + column);
      }
    }
  }

  // Adds rows e .. entries of the warp's 32 to its sums, as many whole batches as there are: rows of
  // a batch are asked for before the first is used. A tile that reaches past the last column takes
  // them one by one.
  template <class Half, int kColumns, int kBatch, bool kWhole>
  static __device__ __forceinline__ void add_entries(float (&sum)[kColumns / 32], const Band& band,
                                                     int column, int row, float g, int e,
                                                     int entries) {
    constexpr int kLoads = kColumns / 64;
    const GemmParams& p = band.p;
#pragma unroll 1
    for (; e + kBatch <= entries; e += kBatch) {
      typename Half::Pair x[kBatch][kLoads];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const i64 at = __shfl_sync(kFullWarp, row, e + b) * p.onehot_ld + column;
#pragma unroll
        for (int i = 0; i < kLoads; i++)
          x[b][i] = kWhole || column + 64 * i < p.n ? Half::load(p.onehot_w, at + 64 * i)
                                                    : typename Half::Pair{};
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        const float factor = __shfl_sync(kFullWarp, g, e + b);
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
          const float2 v = Half::widen(x[b][i]);
          sum[2 * i] = fmaf(factor, v.x, sum[2 * i]);
          sum[2 * i + 1] = fmaf(factor, v.y, sum[2 * i + 1]);
        }
      }
    }
  }

  // Lane (quad q, t) sums columns 8 (q + 8 i) + 2 t + {0, 1}: 128 bytes of a row a load of the warp.
  // Then the quad of the band's row `owner` collects them.
  template <class Half, int kColumns>
  static __device__ __forceinline__ void add_long(float (&acc)[kColumns / 2], const Band& band,
                                                  int owner) {
    const GemmParams& p = band.p;
    const int quad = band.lane >> 2, column = band.my_column() + 8 * quad;
    const List list = list_of(p, band.row + owner);
    float sum[kColumns / 32] = {};
    if (list.summed) {
#pragma unroll
      for (int i = 0; i < kColumns / 64; i++) {
        if (column + 64 * i >= p.n) continue;
        const float2 x =
            __ldg(reinterpret_cast<const float2*>(sum_of(p, list) + column + 64 * i));
        sum[2 * i] = x.x;
        sum[2 * i + 1] = x.y;
      }
    }
#pragma unroll 1
    for (int first = list.first; first < list.last && !list.summed; first += 32) {
      const int mine = min(first + band.lane, list.last - 1), entries = min(32, list.last - first);
      const int row = __ldg(p.onehot_rows + mine);
      const float g = __ldg(p.onehot_g + mine);
      int e = 0;
      if (!band.ragged(kColumns)) {
        constexpr int kBatch = 8;
        add_entries<Half, kColumns, kBatch, true>(sum, band, column, row, g, 0, entries);
        e = entries / kBatch * kBatch;
      }
      add_entries<Half, kColumns, 1, false>(sum, band, column, row, g, e, entries);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 32; i++) {
#pragma unroll
      for (int q = 0; q < 8; q++) {
        const float x = __shfl_sync(kFullWarp, sum[i], 4 * q + (band.lane & 3));
        float* mine = acc + 4 * (q + 8 * (i / 2)) + i % 2;
        mine[0] += owner == quad ? x : 0.f;
        mine[2] += owner == quad + 8 ? x : 0.f;
      }
    }
  }

  template <class Half, int kColumns>
  static __device__ __forceinline__ void add(float (&acc)[kColumns / 2], const Band& band) {
    const GemmParams& p = band.p;
    if (!p.onehot_start) return;
    const bool ragged = band.ragged(kColumns);
    u32 waiting = 0;  // bit 4 * quad + half
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const List list = band.live(half) ? list_of(p, band.my_row(half)) : List{0, 0, false};
      const bool is_long = list.last - list.first >= (ragged ? 1 : kSummed);
      waiting |= (__ballot_sync(kFullWarp, is_long) & 0x11111111u) << half;
      if (is_long) continue;
      for (int e = list.first; e < list.last; e++)
        add_row<Half, kColumns, true>(acc, band, half, __ldg(p.onehot_rows + e),
                                      __ldg(p.onehot_g + e));
    }
#pragma unroll 1
    while (waiting) {
      const int bit = __ffs(waiting) - 1;
      waiting &= waiting - 1;
      add_long<Half, kColumns>(acc, band, bit / 4 + 8 * (bit & 1));
    }
  }
};

}  // namespace logitless
