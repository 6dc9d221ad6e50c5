// fold.cu - the memory-bound kernels that fold: partials of the class tiles to outputs, and small
// sums.
//
// Every sum runs in a fixed order.
//
//   finish_*    32 slots x 16 slices of the tiles (8 for `full`) a block, 9 tiles (fixed: 18, full:
//               4) in flight a thread; 4 to 14 KB of shared memory for the tree over the slices, 56
//               to 92 registers, two blocks a multiprocessor
//   column_sum  32 columns x 8 slices of the rows
// No spills.
#include "logitless/common.cuh"
#include "logitless/statistics/partial.cuh"

using namespace logitless;

// -- partials to outputs ------------------------------------------------------------------------
namespace {

// Block = 32 slots x kSlices slices of the tiles. A slice asks for kBatch tiles before it folds
// them: one by one they would each wait for memory. Then neighbouring slices, in a tree. Partials
// are asked for before it is known which slots are live; what dead ones hold is not used. The time
// is that of one trip to memory and of fetching the code, so what can be a loop is one.
template <class Partial, int kSlices, int kBatch>
__device__ __forceinline__ void finish(const FinishParams& p) {
  __shared__ __align__(16) unsigned char bytes[kSlices * 32 * sizeof(Partial)];
  Partial* shared = (Partial*)bytes;
  const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
  const int slot = blockIdx.x * 32 + lane, count = live_count(p.list);
  const bool writes = slice == 0 && slot < p.list.total;
  const i64 row = writes ? row_at(p.list, slot) : 0;
  const int own = writes && p.list.slots ? p.list.slots[slot] : 0;  // of the row of that number
  const float reference = writes && p.reference ? p.reference[slot] : 0.f;
  auto columns = [&](int tile) {  // the last tile of a launch, and of all launches, is ragged
    const int chunk = tile / p.chunk_tiles,
              in_chunk = (tile - chunk * p.chunk_tiles) * p.tile_columns;
    const i64 chunk_end = min((i64)p.chunk_columns, p.classes - (i64)chunk * p.chunk_columns);
    return (int)min((i64)p.tile_columns, chunk_end - in_chunk);
  };
  Partial state = Partial::empty();
  const int per = (p.tiles + kSlices - 1) / kSlices, end = min(p.tiles, (slice + 1) * per);
#pragma unroll 1
  for (int tile = slice * per; tile < end; tile += kBatch) {
    const float* part = p.part + (i64)tile * p.ld_row + slot;
    Partial next[kBatch + 1];
    next[kBatch] = state;
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int there = min(i, end - 1 - tile);
      next[i] = Partial::load(p, part, there * p.ld_row, columns(tile + there));
    }
#pragma unroll
    for (int i = 1; i < kBatch; i++)
      if (tile + i >= end) next[i] = Partial::empty();
    state = Partial::fold(next);
  }
#pragma unroll 1
  for (int step = 1; step < kSlices; step *= 2) {
    const int place = slice & (2 * step - 1);
    if (place == step) shared[threadIdx.x] = state;
    __syncthreads();  // the right-hand slices are there
    if (place == 0) state.merge(shared[threadIdx.x + 32 * step]);
  }
  if (!writes) return;
  if (slot < count) state.finish(p, row, slot, reference);
  if (own < 0) Partial::empty().finish(p, slot, -1, 0.f);
}

}  // namespace

KERNEL(finish_online, FinishParams, 512, 2) {
  if (p.planes > 2) finish<OnlinePartial<true>, 16, 9>(p);
  else finish<OnlinePartial<false>, 16, 9>(p);
}
KERNEL(finish_fixed, FinishParams, 512, 2) { finish<FixedPartial, 16, 18>(p); }
KERNEL(finish_fixed_moment, FinishParams, 512, 2) { finish<FixedMomentPartial, 16, 9>(p); }
KERNEL(finish_full, FinishParams, 256) { finish<FullPartial, 8, 4>(p); }

// -- small sums ---------------------------------------------------------------------------------
// Block = 32 columns x 8 slices of the rows.
KERNEL(column_sum, ColumnSumParams, 256) {
  __shared__ double shared[8][32];
  const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
  const i64 column = blockIdx.x * 32ll + lane, live = p.count ? *p.count : p.rows,
            rows = (live + p.group - 1) / p.group;
  if (live < 0) return;
  double total = 0.;
  if (column < p.columns) {
    // Short float runs keep the order and the speed; their totals are folded in double.
    for (i64 first = slice; first < rows; first += 8 * 64) {
      float run = 0.f;
      double wide = 0.;
      for (i64 row = first; row < min(rows, first + 8 * 64); row += 8) {
        const i64 at = row * p.tile.row_stride + column * p.tile.column_stride;
        if (p.tile.dtype == 1) {
          wide += ((const double*)p.tile.data)[at];
        } else {
          const bool target = p.target && p.target[row] == p.column0 + column;
          const float x =
              target ? p.value[row] : load_any<float>(p.tile.data, (int)p.tile.dtype, at);
          run += x * (p.weights ? p.weights[row] : 1.f);
        }
      }
      total += run + wide;
    }
  }
  shared[slice][lane] = total;
  __syncthreads();
  if (slice != 0 || column >= p.columns) return;
  for (int i = 1; i < 8; i++) total += shared[i][lane];
  const i64 to = (p.column0 + column) * p.out.row_stride;
  store_any<double>(p.out.data, (int)p.out.dtype, to, total * (p.factor ? *p.factor : 1.));
}

// One warp a row.
KERNEL(row_dots, DotParams, 256) {
  const i64 row = blockIdx.x * 8ll + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (row >= p.rows) return;
  double total = 0.;
  if (row < (p.count ? *p.count : p.rows))
    for (int d = lane; d < p.features; d += 32)
      total += load_any<double>(p.input.data, (int)p.input.dtype,
                                row * p.input.row_stride + d * p.input.column_stride) *
               load_any<double>(p.gradient.data, (int)p.gradient.dtype,
                                row * p.gradient.row_stride + d * p.gradient.column_stride);
  total = warp_sum(total);
  if (lane == 0) p.partial[row] = total;
}

// One thread a row.
KERNEL(absorb_dots, AbsorbDotParams, 256) {
  const i64 row = blockIdx.x * 256ll + threadIdx.x;
  if (row >= p.rows) return;
  double total = p.first ? 0. : p.partial[row];
  if (row < (p.count ? *p.count : p.rows))
    for (int tile = 0; tile < p.tiles; tile++) total += __ldg(p.part + (i64)tile * p.ld_row + row);
  p.partial[row] = total;
}

// One block of 256.
KERNEL(fold_dots, DotParams, 256) {
  __shared__ double shared[8];
  double total = 0.;
  for (i64 row = threadIdx.x; row < p.rows; row += 256) total += p.partial[row];
  total = warp_sum(total);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < 8; i++) total += shared[i];
  if (p.factor) total *= *p.factor;
  if (p.is_double) *(double*)p.out = total;
  else *(float*)p.out = (float)total;
}
