// rest.cuh - `rest` and `entropy`: the log of a sum of exponentials, and the entropy of its
// softmax.
//
// State: the maximum; the sum of e^(z - max) with one maximum left out; the sum of (z - max) e^(z -
// max), to which a maximum adds nothing. Leaving one maximum out keeps every digit of a peaked row:
// its 1 + 1e-9 would be 1 in float.
//   rest = max + log1p(excess)          entropy = log1p(excess) - moment / (1 + excess)  >= 0
// The twin of rust/core's `rest` and `entropy`; Real is float or double.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

template <class Real>
struct Rest {
  Real maximum, excess, moment;

  static __device__ __forceinline__ Rest empty() {
    return {-static_cast<Real>(infinity()), Real(0), Real(0)};
  }

  // One more logit.
  __device__ __forceinline__ void absorb(Real z) { merge({z, Real(0), Real(0)}); }

  // The smaller maximum becomes an ordinary term: with d = its maximum - the larger one <= 0, its
  // terms e^(t) at t = z - max move to t + d. A nan on either side stays.
  __device__ __forceinline__ void merge(const Rest& other) {
    const bool swap = other.maximum > maximum;
    const Rest high = swap ? other : *this, low = swap ? *this : other;
    if (low.maximum == -static_cast<Real>(infinity()) && low.excess == Real(0)) {
      *this = high;
      return;
    }
    const Real d = low.maximum - high.maximum;
    const bool same = low.maximum == high.maximum;  // +inf twice too
    const Real factor = same ? Real(1) : exp(d), shift = same ? Real(0) : d;
    maximum = high.maximum;
    excess = high.excess + factor * (low.excess + Real(1));
    moment = high.moment +
             (factor == Real(0) ? Real(0) : factor * (low.moment + shift * (low.excess + Real(1))));
  }

  __device__ __forceinline__ Real finish() const { return maximum + log1p(excess); }
  __device__ __forceinline__ Real entropy() const {
    const Real h = log1p(excess) - moment / (Real(1) + excess);
    return h < Real(0) ? Real(0) : h;  // nan stays
  }
};

}  // namespace logitless
