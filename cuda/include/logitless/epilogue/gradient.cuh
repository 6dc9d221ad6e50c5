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
// kSums also sums in float, before anything is rounded to 16 bits (both are what is left of terms
// that cancel, and were wrong by 1.5e-2 and 3e-2 where they were taken from G):
//   columns   (rows / 16, ldd) sums of dx over 16 rows, for the gradient of the bias
//   dots      (class blocks, ld_row) sums of dx (E W^T) over a row's block, for that of logit_scale
//
// Flushing |r| < 2^(shift - 126) is free: a 2^shift ex2.ftz(t - shift). Zeros save power in the
// products that follow (2-7% of the time of a power-limited card).
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kAffine, int kStorePanels, bool kSums = false>
struct GradientEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = false;
  static constexpr bool kSliced = false;
  static constexpr bool kRolled = kSums;
  static_assert(!kSums || Map::kCapped, "products and logits side by side");
  static constexpr bool kAhead = false;
  enum Plane { kA, kB, kC, kD, kE };

  template <int kColumns, bool kCareful, class Store>
  static __device__ __forceinline__ void body(float (&acc)[kColumns / 2], const Band& band,
                                              Store& store, const Exceptions& ex) {
    const GemmParams& p = band.p;
    const float factor = Map::factor(p), factor2 = kLog2e * factor, unflush = ptx::exp2(p.shift);
    const float inverse = Map::kCapped && p.softcap != 0.f ? 1.f / p.softcap : 0.f;
    const float scale = kSums ? logit_scale(p) : 0.f;
    float offset[2], a[2], b[2], c[2], d[2], e[2], dots[2] = {0.f, 0.f};
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
          const float product = acc[at];
          float z = product;
          if constexpr (kSums) {
            const int column = band.my_column() + offset_of(at);
            const float bias = p.bias && column < p.n ? __ldg(p.bias + column) : 0.f;
            z = Map::value(product, scale, bias, p.softcap, inverse);
          }
          const float t = fmaf(z, factor2, offset[half]);
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
          if constexpr (kSums) {
            if (kCareful && !ex.is_class(at)) v[i] = 0.f;
            dots[half] = fmaf(v[i], product, dots[half]);
          }
        }
        if constexpr (kSums) {
          if (p.columns) sum_columns(band, 64 * panel + 16 * q, v);
        }
        store.put(q, v);
      }
      store.template close<false>();
    }
    if constexpr (kSums) {
      if (!p.dots) return;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float sum = ptx::quad_sum(dots[half]);
        if ((band.lane & 3) == 0 && band.live(half))
          p.dots[static_cast<i64>(band.block) * p.ld_row + band.my_row(half)] = sum;
      }
    }
  }

  // 16 columns over the warp's 16 rows. Lanes that share columns halve what they hold, then add the
  // rest: lanes 0 to 15 end with one column each.
  static __device__ __forceinline__ void sum_columns(const Band& band, int first,
                                                     const float (&v)[8]) {
    const bool upper = band.lane & 4, odd = band.lane & 8;
    const float low[2] = {v[0] + v[2], v[1] + v[3]}, high[2] = {v[4] + v[6], v[5] + v[7]};
    float mine[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      mine[i] = (upper ? high[i] : low[i]) +
                __shfl_xor_sync(kFullWarp, upper ? low[i] : high[i], 4);
    float sum = (odd ? mine[1] : mine[0]) + __shfl_xor_sync(kFullWarp, odd ? mine[0] : mine[1], 8);
    sum += __shfl_xor_sync(kFullWarp, sum, 16);
    const int column = band.column + first + 8 * upper + 2 * (band.lane & 3) + odd;
    if (band.lane < 16 && column < band.p.n)
      band.p.columns[static_cast<i64>(band.row / 16) * band.p.ldd + column] = sum;
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    if constexpr (!kSums) Map::template apply<kColumns>(acc, band);
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, store, ex);
    else body<kColumns, false>(acc, band, store, ex);
  }
};

}  // namespace logitless
