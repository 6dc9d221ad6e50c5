// maps.cuh - from a product E W^T to the logit z, and the derivative on the way back.
//
//   Scaled   z = scale * acc: the factor folds into the exponential's multiplier
//   Capped   z = softcap * tanh((scale * acc + bias) / softcap): either part may be absent
//
// apply() turns accumulators into z / factor() in place (kApart: a nan stays in its column, where
// that is an output; else it may reach the neighbour in the same row, whose sum it spoils anyway),
// value() makes one z beside its product; slope() is dz/dx.
#pragma once
#include "logitless/epilogue/band.cuh"

namespace logitless {

// logit_scale: a number, or a value that the device computed.
__device__ __forceinline__ float logit_scale(const GemmParams& p) {
  return p.scale_at ? __ldg(p.scale_at) : p.scale;
}

struct Scaled {
  static constexpr bool kCapped = false;
  static __device__ __forceinline__ float factor(const GemmParams& p) { return logit_scale(p); }

  template <int kColumns, bool kApart = false>
  static __device__ __forceinline__ void apply(float (&)[kColumns / 2], const Band&) {}

  static __device__ __forceinline__ float slope(float, float) { return 1.f; }
};

struct Capped {
  static constexpr bool kCapped = true;
  static __device__ __forceinline__ float factor(const GemmParams&) { return 1.f; }

  template <int kColumns, bool kApart = false>
  static __device__ __forceinline__ void apply(float (&acc)[kColumns / 2], const Band& band) {
    const GemmParams& p = band.p;
    const int column = band.my_column();
    const float scale = logit_scale(p);
#pragma unroll
    for (int j = 0; j < kColumns / 8; j++) {
      float b[2] = {0.f, 0.f};
      if (p.bias) {
#pragma unroll
        for (int k = 0; k < 2; k++)
          if (column + 8 * j + k < p.n) b[k] = __ldg(p.bias + column + 8 * j + k);
      }
#pragma unroll
      for (int k = 0; k < 4; k++) acc[4 * j + k] = fmaf(scale, acc[4 * j + k], b[k & 1]);
    }
    if (p.softcap != 0.f) {
      const float units = 2.f * kLog2e / p.softcap;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2) {
        float x = units * acc[i], y = units * acc[i + 1];
        if (kApart) {
          x = ptx::tanh(x);
          y = ptx::tanh(y);
        } else {
          ptx::tanh_pair(x, y);
        }
        acc[i] = p.softcap * x;
        acc[i + 1] = p.softcap * y;
      }
    }
  }

  // z of one product.
  static __device__ __forceinline__ float value(float acc, float scale, float bias, float softcap,
                                                float inverse) {
    const float x = fmaf(scale, acc, bias);
    return inverse == 0.f ? x : softcap * ptx::tanh(2.f * kLog2e * inverse * x);
  }

  // 1 - (z / softcap)^2; inverse = 1 / softcap, or 0 without one (z = -inf is a masked class).
  static __device__ __forceinline__ float slope(float z, float inverse) {
    const float u = z * inverse;
    return inverse == 0.f ? 1.f : fmaf(-u, u, 1.f);
  }
};

}  // namespace logitless
