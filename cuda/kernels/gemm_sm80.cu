// gemm_sm80.cu - one instance of the mma.sync mainloop (schedule/sm80.cuh: ring, barriers and the
// race that each prevents). cuda/arch.toml lists the instances; the build passes
//   NAME, OP (OP_*), DTYPE (DTYPE_BF16 | DTYPE_F16 | DTYPE_F32), MAP (0: scale, 1: bias and softcap
//   too), STAGES, TILE_N, SMEM (dynamic shared memory that the host asks for).
//
//   tile      types   stages  shared bytes  accumulators  registers  spills
//   t128x256  halves  4       98304         128           242 - 250  0
//   t128x128  floats  4       65536         64 + 64       231 - 241  0
//
// 256 threads, one CTA an SM; the grid may have any number of CTAs up to the tiles.
#include "logitless/epilogue/select.cuh"
#include "logitless/schedule/sm80.cuh"

namespace logitless {
#if DTYPE == DTYPE_BF16
using Element = Bf16;
#elif DTYPE == DTYPE_F16
using Element = F16;
#else
using Element = F32;
#endif
#if MAP
using Map = Capped;
#else
using Map = Scaled;
#endif
using Op = Operation<OP, Map, 0>;
using Config =
    Sm80Config<Element, TILE_N, TILE_N == 256 ? 64 : 32, STAGES, Op::kMajorA, Op::kMajorB>;
using Gemm = Sm80Gemm<Config, typename Op::Epilogue>;
static_assert(SMEM >= Gemm::kSharedBytes, "arch.toml asks for too little shared memory");
}  // namespace logitless

extern "C" __global__ void __launch_bounds__(256, 1)
    NAME(const __grid_constant__ logitless::GemmParams p) {
  logitless::Gemm::run(p);
}
