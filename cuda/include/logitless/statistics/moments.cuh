// moments.cuh - `sum`, `sum_sq`, `variance`: count, mean and squared deviations, merged by Chan's
// formula.
//
// sum_sq = deviations + count mean^2 loses nothing (both terms are positive); the variance never
// subtracts.
#pragma once

namespace logitless {

template <class Real>
struct Moments {
  Real count, mean, deviations;

  static __device__ __forceinline__ Moments empty() { return {Real(0), Real(0), Real(0)}; }
  static __device__ __forceinline__ Moments block(Real count, Real sum, Real deviations) {
    return {count, sum / count, deviations};
  }

  __device__ __forceinline__ void absorb(Real z) { merge({Real(1), z, Real(0)}); }

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == Real(0)) return;
    const Real total = count + other.count, step = other.mean - mean, share = other.count / total;
    mean += step * share;
    deviations += other.deviations + step * step * count * share;
    count = total;
  }

  __device__ __forceinline__ Real sum() const { return count * mean; }
  __device__ __forceinline__ Real sum_sq() const { return deviations + count * mean * mean; }
  __device__ __forceinline__ Real variance() const { return deviations / count; }
};

}  // namespace logitless
