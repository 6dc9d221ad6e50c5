// wgmma.cuh - ordering of the asynchronous warpgroup product (sm_90a). The products themselves:
// mma/wgmma.cuh.
#pragma once
#include "logitless/types.cuh"

namespace logitless::ptx {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Tells the compiler that the accumulators change here: they do, asynchronously.
template <int kCount>
__device__ __forceinline__ void touch(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(r[i])::"memory");
}

}  // namespace logitless::ptx
