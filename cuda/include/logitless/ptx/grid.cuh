// grid.cuh - a kernel and the one that follows it on the stream (programmatic dependent launch).
//
// The host launches the second kernel with Start::Beside (rust/gpu/src/driver.rs). Its blocks then
// fill multiprocessors as blocks of the first end, instead of waiting for all of them. Before
// compute capability 9.0 both calls are nothing, and the host launches one after the other.
#pragma once

namespace logitless::ptx {

// The kernel that follows may start once every block has called this, or ended. It is a hint and
// makes nothing visible: the other side of every hazard is wait_for_grid_ahead.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel ahead has ended and its writes are visible; at once where this one was launched
// after it.
__device__ __forceinline__ void wait_for_grid_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace logitless::ptx
