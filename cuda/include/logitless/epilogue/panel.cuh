// panel.cuh - stores of a warpgroup's 64-row fragment through shared memory (sm_90a): registers ->
// swizzled panel -> TMA.
//
// A panel is 64 rows x 128 bytes (64 halves or 32 floats), 128-byte swizzle: 16-byte chunk c of row
// r lies at chunk c ^ (r & 7). Four fences and barriers a panel:
//   wait_group.read + barrier   the TMA store that last read this panel is done before anyone
//                               overwrites it
//   fence.proxy.async           each writer's generic stores are visible to the copy engine ...
//   barrier                     ... for all 128 writers, before one thread issues the store
// One panel is as fast as two where the freed 16 KB buy a fifth stage.
#pragma once
#include "logitless/mma/sm90.cuh"
#include "logitless/ptx/barrier.cuh"
#include "logitless/ptx/half.cuh"
#include "logitless/ptx/matrix.cuh"
#include "logitless/ptx/tma.cuh"

namespace logitless {

template <class Half_, int kPanels>
struct PanelStore {
  using Half = Half_;
  const TensorMap* map;
  u32 base, barrier;
  int warp, lane, row;  // row: first of the fragment
  int column = 0;
  u32 current = 0;

  __device__ __forceinline__ PanelStore(const TensorMap* map, u32 base, u32 barrier, int warp,
                                        int lane)
      : map(map), base(base), barrier(barrier), warp(warp), lane(lane), row(0) {}

  __device__ __forceinline__ bool leader() const { return warp == 0 && lane == 0; }

  __device__ __forceinline__ void open(int first_column) {
    column = first_column;
    if (leader()) ptx::bulk_wait_read<kPanels == 2 ? 1 : 0>();
    ptx::barrier_sync(barrier, 128);
  }
  __device__ __forceinline__ u32 panel() const { return base + current * kPanelBytes; }

  template <bool kAdd>
  __device__ __forceinline__ void close() {
    ptx::fence_proxy_shared();
    ptx::barrier_sync(barrier, 128);
    if (leader()) {
      if (kAdd) ptx::tma_reduce_add(map, panel(), column, row);
      else ptx::tma_store(map, panel(), column, row);
      ptx::bulk_commit();
    }
    if (kPanels == 2) current ^= 1;
  }

  // The same, row i of D to row `places[i]` of memory; rows from `live` on and columns from
  // `columns` on, a multiple of 8, are nowhere. A warp reads the 16 rows that it has put there: 8
  // lanes write 128 bytes of one. The next `open` waits for all of them.
  __device__ __forceinline__ void close_to(u16* out, i64 pitch, const int* places, int live,
                                           int columns) {
    __syncwarp();  // every lane's part of the rows is there
    const int at = column + 8 * (lane & 7);
#pragma unroll 1  // the accumulators leave no registers for four rows
    for (int i = 0; i < 4; i++) {
      const int r = warp * 16 + 4 * i + (lane >> 3);
      if (row + r >= live || at >= columns) continue;
      const uint4 x = ptx::load_shared(panel() + r * 128 + (((lane & 7) ^ (r & 7)) << 4));
      *reinterpret_cast<uint4*>(out + __ldg(places + row + r) * pitch + at) = x;
    }
    if (kPanels == 2) current ^= 1;
  }

  // 16 columns (quarter q of a 64-column panel) as halves: v in fragment order.
  __device__ __forceinline__ void put(int q, const float (&v)[8]) {
    const int r = warp * 16 + (lane & 15);
    const u32 chunk =
        2 * q +
        (lane >> 4);  // matrices: (rows 0-7, j), (rows 8-15, j), (rows 0-7, j+1), (rows 8-15, j+1)
    ptx::stmatrix_x4(panel() + r * 128 + ((chunk ^ (r & 7)) << 4), Half::pack(v[0], v[1]),
                     Half::pack(v[2], v[3]), Half::pack(v[4], v[5]), Half::pack(v[6], v[7]));
  }
  // 8 columns (quarter j of a 32-column panel) as floats.
  __device__ __forceinline__ void put_float(int j, const float (&v)[4]) {
    const int r = warp * 16 + (lane >> 2);
    const u32 at = (((2 * j + ((lane & 3) >> 1)) ^ (r & 7)) << 4) +
                   ((lane & 1) << 3);  // r and r + 8 share r & 7
    ptx::store_shared(panel() + r * 128 + at, v[0], v[1]);
    ptx::store_shared(panel() + (r + 8) * 128 + at, v[2], v[3]);
  }
  __device__ __forceinline__ void drain() {
    if (kPanels && leader()) ptx::bulk_wait_read<0>();
  }
};

}  // namespace logitless
