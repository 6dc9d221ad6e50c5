// gemm_sm90.cu - one instance of the Hopper mainloop (schedule/sm90.cuh: roles, ring, barriers and
// the race that each prevents). cuda/arch.toml lists the instances; the build passes
//   NAME, OP (OP_*), DTYPE (DTYPE_BF16 | DTYPE_F16), MAP (0: scale, 1: bias and softcap too),
//   TILE_M, TILE_N, STAGES, PANELS, CLUSTER, PINGPONG, SMEM (dynamic shared memory that the host
//   asks for).
//
//   tile      stages  shared bytes  accumulators  operations
//   p128x192  5       204880        192           online_rest, online, statistics, repair
//             5       221264        192           gradient_ce, gradient, gradient_sums, store_exp,
//                                                store_moment, logits
//             4       196672        192           gradient_ce, gradient, store_exp, store_moment
//                                                with a map
//   c128x256  4       229440        128           dw, dw_f32, de, de_f32
//   c128x192  4       196672        96            dw, de_f32
//   c256x192  3       204848        192           dw, de, de_f32
//   (p: ping-pong, a warpgroup a tile; c: cooperative, both on one tile)
//
// 384 threads, clusters of 2, 168 registers at entry, then 24 + 2 x 240 (192 accumulators) or 40 +
// 2 x 232. Spills: none in c tiles; 0 to 64 bytes a tile in p tiles; never inside a k loop. The
// build's table has them kernel by kernel.
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
using Config =
    Sm90Config<Half, TILE_M, TILE_N, STAGES, CLUSTER, PINGPONG != 0, Op::kMajorA, Op::kMajorB>;
using Gemm = Sm90Gemm<Config, typename Op::Epilogue>;
static_assert(SMEM >= Gemm::kSharedBytes, "arch.toml asks for too little shared memory");
}  // namespace logitless

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    NAME(const __grid_constant__ logitless::TensorMap a,
         const __grid_constant__ logitless::TensorMap b,
         const __grid_constant__ logitless::TensorMap d,
         const __grid_constant__ logitless::GemmParams p) {
  logitless::Gemm::run(&a, &b, &d, p);
}
