// fragments.cuh - an epilogue over the row fragments that a warp holds.
//
// Registers have no run-time index, so a loop over fragments is either unrolled, or it always works
// on the first fragment and moves the others down. An unrolled epilogue is straight-line code that
// runs once a tile: past some 32 KB it falls out of the instruction cache and every 128-byte line
// costs a trip to the L2 (the full statistics at D = 1024: 2.26 ms unrolled, where one product
// takes 1.58). The moves cost one instruction an accumulator.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

template <bool kRolled, int kCount, int kSize, class Function>
__device__ __forceinline__ void for_each_fragment(float (&acc)[kCount][kSize], Function&& f) {
  if constexpr (kRolled && kCount > 1) {
#pragma unroll 1
    for (int i = 0; i < kCount; i++) {
      f(acc[0], i);
#pragma unroll
      for (int j = 0; j + 1 < kCount; j++)
#pragma unroll
        for (int k = 0; k < kSize; k++) acc[j][k] = acc[j + 1][k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) f(acc[i], i);
  }
}

}  // namespace logitless
