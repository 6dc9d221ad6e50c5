// gemm_sm90.cu - one instance of the Hopper mainloop a compilation; the build passes what varies:
//   NAME, OP (OP_*), DTYPE (DTYPE_BF16 | DTYPE_F16), MAP (0: scale, 1: bias and softcap too), TILE_M, TILE_N, STAGES, PANELS,
//   CLUSTER, PINGPONG, SMEM (dynamic shared memory that the host will ask for).
#include "logitless/epilogue/select.cuh"
#include "logitless/schedule/sm90.cuh"

namespace logitless {
#if DTYPE == DTYPE_BF16
using Half = Bf16;
#else
using Half = F16;
#endif
#if MAP
using Map = Capped;
#else
using Map = Scaled;
#endif
using Op = Operation<OP, Map, PANELS>;
using Config = Sm90Config<Half, TILE_M, TILE_N, STAGES, CLUSTER, PINGPONG != 0, Op::kMajorA, Op::kMajorB>;
using Gemm = Sm90Gemm<Config, typename Op::Epilogue>;
static_assert(SMEM >= Gemm::kSharedBytes, "arch.toml asks for too little shared memory");
}  // namespace logitless

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    NAME(const __grid_constant__ logitless::TensorMap a, const __grid_constant__ logitless::TensorMap b,
         const __grid_constant__ logitless::TensorMap d, const __grid_constant__ logitless::GemmParams p) {
  logitless::Gemm::run(&a, &b, &d, p);
}
