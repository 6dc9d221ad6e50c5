// store.cuh - accumulators that are the result: dW, dE, logits.
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

// D = half(alpha * row factor * acc). kOneHot adds onehot_g[i] * W[target[i], :] in float: the
// target's part of dE is the largest and never passes through 16 bits but once (error 0.235% ->
// 0.166%, the floor of a bf16 result).
template <bool kOneHot, int kStorePanels>
struct HalfStoreEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = false;
  static constexpr bool kRolled = false;

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    using Half = typename Store::Half;
    const GemmParams& p = band.p;
    const float alpha = p.alpha ? __ldg(p.alpha) : 1.f;
    const int column = band.my_column();
    float a[2], g[2] = {0.f, 0.f};
    i64 w[2] = {-1, -1};  // element of onehot_w under acc[0]
#pragma unroll
    for (int half = 0; half < 2; half++) {
      a[half] = p.coef ? alpha * band.coefficient(0, half) : alpha;
      if (kOneHot && band.live(half)) {
        const int y = __ldg(p.target + band.my_row(half));
        if (y >= 0) {
          g[half] = __ldg(p.onehot_g + band.my_row(half));
          w[half] = y * p.onehot_ld + column;
        }
      }
    }
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; panel++) {
      store.open(band.column + 64 * panel);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          const int at = 32 * panel + 8 * q + i, half = half_of(at), offset = offset_of(at);
          v[i] = acc[at] * a[half];
          v[i + 1] = acc[at + 1] * a[half];
          if (kOneHot && w[half] >= 0 && column + offset < p.n) {
            const float2 x = Half::pair(p.onehot_w, w[half] + offset);
            v[i] = fmaf(g[half], x.x, v[i]);
            v[i + 1] = fmaf(g[half], x.y, v[i + 1]);
          }
        }
        store.put(q, v);
      }
      store.template close<false>();
    }
  }
};

// D = alpha * acc in float, or D += it (kMapped: D = z, the logits after the maps).
template <class Map, bool kMapped, int kStorePanels>
struct FloatStoreEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = false;
  static constexpr bool kRolled = false;

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    const GemmParams& p = band.p;
    if (kMapped) Map::template apply<kColumns>(acc, band);
    const float alpha = kMapped ? Map::factor(p) : p.alpha ? __ldg(p.alpha) : 1.f;
#pragma unroll
    for (int panel = 0; panel < kColumns / 32; panel++) {
      store.open(band.column + 32 * panel);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = alpha * acc[16 * panel + 4 * j + i];
        store.put_float(j, v);
      }
      if (p.accumulate) store.template close<true>();
      else store.template close<false>();
    }
  }
};

}  // namespace logitless
