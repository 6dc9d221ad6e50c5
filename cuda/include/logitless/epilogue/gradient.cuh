// gradient.cuh - the tile of logit gradients G = half(dx), from logits made again.
//
// With t = z - rest and r = e^t (<= 1: nothing overflows), per-row coefficients (GemmParams.coef,
// planes a, b, c, d, e):
//   kAffine   off the target            at it          for
//   false     a r                       e              cross entropy, every function of rest
//   true      r (a + b t) + c + d z     c + d z + e    entropy, sum, squares, variance
// times dz/dx under a softcap. r = 0 contributes 0 even where z is -inf (a bias of -inf masks a
// class).
//
// The host divides the coefficients by one device scalar, the largest of them, and the products
// that consume G multiply it back in float (GemmParams.alpha). A uniform cotangent then becomes
// exactly +-1: rounding -1/8191 to bf16 once a row, always the same way, was half of the error of
// dE and dW. It also keeps fp16 away from its small end.
//
// Flushing |r| < 2^(shift - 126) is free: a 2^shift ex2.ftz(t - shift). Zeros save power in the
// products that follow (2-7% of the time of a power-limited card).
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kAffine, int kStorePanels>
struct GradientEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = false;
  static constexpr bool kSliced = false;
  static constexpr bool kRolled = false;
  enum Plane { kA, kB, kC, kD, kE };

  template <int kColumns, bool kCareful, class Store>
  static __device__ __forceinline__ void body(float (&acc)[kColumns / 2], const Band& band,
                                              Store& store, const Exceptions& ex) {
    const GemmParams& p = band.p;
    const float factor = Map::factor(p), factor2 = kLog2e * factor, unflush = ptx::exp2(p.shift);
    const float inverse = Map::kCapped && p.softcap != 0.f ? 1.f / p.softcap : 0.f;
    float offset[2], a[2], b[2], c[2], d[2], e[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      offset[half] = fmaf(-kLog2e, band.scalar(p.ref, half, infinity()), -p.shift);
      a[half] = unflush * band.coefficient(kA, half);
      e[half] = kCareful ? band.coefficient(kE, half) : 0.f;
      if (kAffine) {
        b[half] = unflush * kLn2 * band.coefficient(kB, half);  // t comes in units of log2
        a[half] = fmaf(p.shift, b[half], a[half]);              // ... and shifted
        c[half] = band.coefficient(kC, half);
        d[half] = factor * band.coefficient(kD, half);
      }
    }
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; panel++) {
      store.open(band.column + 64 * panel);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at = 32 * panel + 8 * q + i, half = half_of(at);
          const float z = acc[at], t = fmaf(z, factor2, offset[half]);
          const float r = ptx::exp2(t);
          const bool target = kCareful && ex.is_target(at);
          if (kAffine) {
            const float rest = r * fmaf(b[half], fmaxf(t, -300.f), a[half]);
            const float everywhere = d[half] != 0.f ? fmaf(d[half], z, c[half]) : c[half];
            v[i] = (target ? e[half] : rest) + everywhere;
          } else {
            v[i] = target ? e[half] : r * a[half];
          }
          if (Map::kCapped) v[i] *= Map::slope(z, inverse);
        }
        store.put(q, v);
      }
      store.template close<false>();
    }
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    Map::template apply<kColumns>(acc, band);
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, store, ex);
    else body<kColumns, false>(acc, band, store, ex);
  }
};

}  // namespace logitless
