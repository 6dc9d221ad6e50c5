// tma.cuh - the bulk tensor copy engine (sm_90a): 2-D tiles between global and shared memory.
//
// Loads zero-fill outside the map's extents, element by element. Stores clip at 16 bytes, not at
// the element: up to 14 bytes past the last column of a row are written, so a pitch is a multiple
// of 16 bytes and its padding belongs to the buffer.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

// 128 opaque bytes that cuTensorMapEncodeTiled fills on the host; passed by value as a
// __grid_constant__ (no descriptor memory, no fence, safe in a captured graph).
struct alignas(64) TensorMap {
  char opaque[128];
};

namespace ptx {

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// x: innermost coordinate, y: row; both in elements. Completes `bytes of the box` on the mbarrier.
__device__ __forceinline__ void tma_load(u32 dst, const TensorMap* map, int x, int y, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(dst),
      "l"(reinterpret_cast<u64>(map)), "r"(x), "r"(y), "r"(bar)
      : "memory");
}
// The box lands at the same offset of every CTA of the cluster, and completes on the same barrier
// offset there.
template <int kCluster>
__device__ __forceinline__ void tma_load_multicast(u32 dst, const TensorMap* map, int x, int y,
                                                   u32 bar) {
  if constexpr (kCluster == 1) {
    tma_load(dst, map, x, y, bar);
  } else {
    constexpr u16 kEveryone = (1 << kCluster) - 1;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
        "cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
        "l"(reinterpret_cast<u64>(map)), "r"(x), "r"(y), "r"(bar), "h"(kEveryone)
        : "memory");
  }
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   reinterpret_cast<u64>(map)),
               "r"(x), "r"(y), "r"(src)
               : "memory");
}
// float adds in the L2. Deterministic here: one launch adds to an element once, and launches are
// ordered by the stream.
__device__ __forceinline__ void tma_reduce_add(const TensorMap* map, u32 src, int x, int y) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], "
      "[%3];" ::"l"(reinterpret_cast<u64>(map)),
      "r"(x), "r"(y), "r"(src)
      : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>  // until at most kPending stores have not yet read their shared memory
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void fence_proxy_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace ptx
}  // namespace logitless
