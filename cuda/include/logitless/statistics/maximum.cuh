// maximum.cuh - `max`, `argmax`: the largest logit and its class. A nan wins over everything; the
// lowest id wins among equals.
#pragma once
#include "logitless/types.cuh"

namespace logitless {

template <class Real>
struct Maximum {
  Real value;
  long long id;

  static __device__ __forceinline__ Maximum empty() {
    return {-static_cast<Real>(infinity()), 0x7fffffffffffffffll};
  }

  __device__ __forceinline__ void absorb(Real z, long long id) { merge({z, id}); }

  __device__ __forceinline__ void merge(const Maximum& other) {
    const bool mine = value != value, theirs = other.value != other.value;
    const bool larger = mine == theirs ? !mine && other.value > value : theirs;
    const bool equal = mine == theirs && (mine || other.value == value);
    if (larger || (equal && other.id < id)) *this = other;
  }
};

}  // namespace logitless
