// select.cuh - the operations of the tensor-core family by name (OP_*, given by the build):
// epilogue and operand majors.
//
//   operation      A, B            D      epilogue
//   online_rest    E, W            -      maximum and sum a class block; no reference
//   repair         E, W            -      the same for listed row blocks only
//   online         E, W            -      + moment (entropy)
//   statistics     E, W            -      + sum, squares, maximum and its class
//   store_exp      E, W            half   exponentials against the target's logit, and their sums
//   store_moment   E, W            half   the same, and moments (entropy)
//   gradient_ce    E, W            half   G from a, e
//   gradient       E, W            half   G from a, b, c, d, e
//   gradient_sums  E, W            half   the same, and sums over its rows and columns
//   logits         E, W            float  z
//   dw, dw_f32     G^T, E^T        half, float
//   de, de_f32     G, W^T          half, float
#pragma once
#include "logitless/epilogue/gradient.cuh"
#include "logitless/epilogue/online.cuh"
#include "logitless/epilogue/store.cuh"
#include "logitless/epilogue/store_exp.cuh"

namespace logitless {

template <int kOp, class Map, int kPanels>
struct Operation;

template <class E, int kA, int kB>
struct OperationOf {
  using Epilogue = E;
  static constexpr int kMajorA = kA, kMajorB = kB;
};

template <class Map, int kPanels>
struct Operation<OP_ONLINE_REST, Map, kPanels>
    : OperationOf<OnlineEpilogue<Map, false, false>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_REPAIR, Map, kPanels>
    : OperationOf<OnlineEpilogue<Map, false, false, true>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_ONLINE, Map, kPanels> : OperationOf<OnlineEpilogue<Map, true, false>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_STATISTICS, Map, kPanels> : OperationOf<OnlineEpilogue<Map, true, true>, 0, 0> {
};
template <class Map, int kPanels>
struct Operation<OP_STORE_EXP, Map, kPanels>
    : OperationOf<StoreExpEpilogue<Map, false, kPanels>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_STORE_MOMENT, Map, kPanels>
    : OperationOf<StoreExpEpilogue<Map, true, kPanels>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_GRADIENT_CE, Map, kPanels>
    : OperationOf<GradientEpilogue<Map, false, kPanels>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_GRADIENT, Map, kPanels>
    : OperationOf<GradientEpilogue<Map, true, kPanels>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_GRADIENT_SUMS, Map, kPanels>
    : OperationOf<GradientEpilogue<Map, true, kPanels, true>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_LOGITS, Map, kPanels>
    : OperationOf<FloatStoreEpilogue<Map, true, NoTargets, kPanels>, 0, 0> {};
template <class Map, int kPanels>
struct Operation<OP_DW, Map, kPanels> : OperationOf<HalfStoreEpilogue<ClassTargets, kPanels>, 1, 1> {};
template <class Map, int kPanels>
struct Operation<OP_DW_F32, Map, kPanels>
    : OperationOf<FloatStoreEpilogue<Map, false, ClassTargets, kPanels>, 1, 1> {};
template <class Map, int kPanels>
struct Operation<OP_DE, Map, kPanels> : OperationOf<HalfStoreEpilogue<RowTargets, kPanels>, 0, 1> {};
template <class Map, int kPanels>
struct Operation<OP_DE_F32, Map, kPanels>
    : OperationOf<FloatStoreEpilogue<Map, false, NoTargets, kPanels>, 0, 1> {};

}  // namespace logitless
