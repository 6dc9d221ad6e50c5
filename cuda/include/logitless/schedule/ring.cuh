// ring.cuh - a position in the ring of shared-memory stages, with the parity of its current lap.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

template <int kStages>
struct RingPosition {
  int stage = 0;
  u32 lap = 0;  // parity

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      lap ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int n) {  // what the other warpgroup consumes (ping-pong)
    const int x = stage + n;
    lap ^= (x / kStages) & 1;
    stage = x % kStages;
  }
};

}  // namespace logitless
