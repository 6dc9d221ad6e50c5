// band.cuh - what an epilogue sees: one warp's 16 rows of a tile, whichever mainloop made it.
//
// wgmma (m64nNk16) and mma.sync (m16n8k16) hand out float accumulators alike. Of the 16 x kColumns
// fragment of a warp, lane l holds for j = 0 .. kColumns/8 - 1
//   acc[4j + 0], acc[4j + 1]   row l/4,      columns 8j + 2 (l%4) + {0, 1}
//   acc[4j + 2], acc[4j + 3]   row l/4 + 8,  the same columns
// so an epilogue written over this layout serves both. The four lanes of a quad (same l/4) share
// two rows.
#pragma once
#include "logitless/params.cuh"
#include "logitless/ptx/math.cuh"

namespace logitless {

struct Band {
  const GemmParams& p;
  int rows;    // live rows of the launch
  int row;     // first of the 16
  int column;  // first of the kColumns
  int block;   // class block: index of the partials
  int lane;

  __device__ __forceinline__ int my_row(int half) const { return row + (lane >> 2) + 8 * half; }
  __device__ __forceinline__ bool live(int half) const { return my_row(half) < rows; }
  __device__ __forceinline__ int my_column() const { return column + 2 * (lane & 3); }  // of acc[0]
  // A per-row scalar; `other` for rows past the end.
  __device__ __forceinline__ float scalar(const float* x, int half, float other) const {
    return live(half) ? __ldg(x + my_row(half)) : other;
  }
  __device__ __forceinline__ float coefficient(int plane, int half) const {
    return scalar(p.coef + static_cast<i64>(plane) * p.ld_row, half, 0.f);
  }
  __device__ __forceinline__ bool ragged(int columns) const { return column + columns > p.n; }
  // Partial result of one row and this class block; the quad's lane 0 writes.
  __device__ __forceinline__ void emit(int plane, int half, float x) const {
    if ((lane & 3) == 0 && live(half))
      p.part[plane * p.part_plane + static_cast<i64>(block) * p.ld_row + my_row(half)] = x;
  }
};

// Row half (0: row l/4, 1: row l/4 + 8) and column offset from my_column() of accumulator i:
// compile-time in unrolled loops.
__device__ constexpr int half_of(int i) { return (i >> 1) & 1; }
__device__ constexpr int offset_of(int i) { return 8 * (i >> 2) + (i & 1); }

// Which of a lane's elements need care: the target's column, and columns past the last class.
struct Exceptions {
  int target
      [2];    // offset of the row's target from my_column(); an impossible one when it is elsewhere
  int limit;  // offsets below it are classes
  bool any;   // of the whole warp: take the careful path

  template <int kColumns>
  static __device__ __forceinline__ Exceptions find(const Band& band) {
    constexpr int kNowhere = -(1 << 24);
    Exceptions e;
    bool mine = band.ragged(kColumns);
    // Columns past the last one are another launch's classes, or none.
    const unsigned columns = min(kColumns, band.p.n - band.column);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int y =
          band.p.target && band.live(half) ? __ldg(band.p.target + band.my_row(half)) : -1;
      const int offset = y - band.p.col0 - band.column;
      const bool inside = y >= 0 && static_cast<unsigned>(offset) < columns;
      e.target[half] = inside ? offset - 2 * (band.lane & 3) : kNowhere;
      mine = mine || inside;
    }
    e.limit = band.p.n - band.my_column();
    e.any = __any_sync(kFullWarp, mine);
    return e;
  }
  __device__ __forceinline__ bool is_target(int i) const {
    return offset_of(i) == target[half_of(i)];
  }
  // Whether one of the lane's own elements is the target of a row half.
  __device__ __forceinline__ bool has_target(int half) const {
    return target[half] >= 0 && (target[half] & 7) < 2;
  }
  __device__ __forceinline__ bool is_class(int i) const { return offset_of(i) < limit; }
  __device__ __forceinline__ bool is_rest(int i) const { return is_class(i) && !is_target(i); }
};

}  // namespace logitless
