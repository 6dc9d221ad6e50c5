// partial.cuh - what the planes of a tensor-core tile hold for one row: loaded, merged in a fixed order, written as outputs.
#pragma once
#include "logitless/common.cuh"
#include "logitless/statistics/maximum.cuh"
#include "logitless/statistics/moments.cuh"
#include "logitless/statistics/rest.cuh"

namespace logitless {

struct RowPartial {
  Rest<float> rest;
  Moments<double> moments;
  Maximum<float> maximum;
  double fixed, fixed_moment;  // sums past a fixed reference

  static __device__ __forceinline__ RowPartial empty() {
    return {Rest<float>::empty(), Moments<double>::empty(), Maximum<float>::empty(), 0., 0.};
  }
  static __device__ __forceinline__ RowPartial load(const float* part, i64 plane, int planes, bool fixed, int columns) {
    RowPartial r = empty();
    if (fixed) {
      r.fixed = __ldg(part);
      if (planes == 2) r.fixed_moment = __ldg(part + plane);
      return r;
    }
    r.rest = {__ldg(part), __ldg(part + plane), planes > 2 ? __ldg(part + 2 * plane) : 0.f};
    if (planes < 7) return r;
    r.moments = Moments<double>::block(columns, __ldg(part + 3 * plane), __ldg(part + 4 * plane));
    r.maximum = {__ldg(part + 5 * plane), __float_as_int(__ldg(part + 6 * plane))};
    return r;
  }
  __device__ __forceinline__ void merge(const RowPartial& other, int planes) {
    fixed += other.fixed;
    fixed_moment += other.fixed_moment;
    rest.merge(other.rest);
    if (planes < 7) return;
    moments.merge(other.moments);
    maximum.merge(other.maximum);
  }
  // Writes every field that is wanted; slot -1 is an ignored row.
  __device__ __forceinline__ void finish(const Fields& out, i64 row, int slot, const float* reference) const {
    auto put = [&](void* field, float x) {
      if (field) ((float*)field)[row] = slot < 0 ? 0.f : x;
    };
    put(out.rest, reference == nullptr ? rest.finish() : (float)(*reference + log(fixed)));
    put(out.entropy, reference == nullptr ? entropy() : fmaxf(0.f, (float)(log(fixed) - fixed_moment / fixed)));
    put(out.sum, (float)moments.sum());
    put(out.sum_sq, (float)moments.sum_sq());
    put(out.mean, (float)moments.mean);
    put(out.variance, (float)moments.variance());
    put(out.max, maximum.value);
    if (out.argmax) out.argmax[row] = slot < 0 ? -1 : maximum.id;
  }

 private:
  // No class but the targets: no distribution, entropy 0.
  __device__ __forceinline__ float entropy() const { return rest.maximum == -infinity() ? rest.excess : rest.entropy(); }
};

}  // namespace logitless
