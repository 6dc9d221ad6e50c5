//! The public calls: every check of their arguments, then dispatch to the engine of the level.

use crate::element::DType;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::level::{WithKernel, dispatch};
use crate::plan::Plan;
use crate::spec::Spec;
use crate::tensor::Tensor;
use crate::{backward as backward_engine, forward as forward_engine, pool};

/// The operands of a call: a linear head, its inputs, and what the statistics refer to.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// (outer, inner, D): row i is (i / inner, i % inner).
    pub input: Tensor,
    /// (V, D), of the input's type.
    pub weight: Tensor,
    /// (V,), of the input's type.
    pub bias: Option<Tensor>,
    /// (N, K) class ids, contiguous i64.
    pub ids: Option<Tensor>,
    /// The id that stands for no class. A row without any class is skipped.
    pub ignore_index: Option<i64>,
    /// Factor of E Wᵀ.
    pub logit_scale: f64,
    /// Bound of the logits; 0 means none.
    pub softcap: f64,
    /// (C, V) class vectors, in the accumulation type.
    pub vectors: Option<Tensor>,
    /// (N, V) weights of `dot`, any float type.
    pub dense: Option<Tensor>,
}

/// Where a backward writes. A gradient that is not wanted costs nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gradients {
    /// (outer, inner, D), of the input's type or the accumulation type. Skipped rows are zero.
    pub input: Option<Tensor>,
    /// (V, D), of the weight's type or the accumulation type.
    pub weight: Option<Tensor>,
    /// (V,), of the bias's type or the accumulation type.
    pub bias: Option<Tensor>,
    /// (1,), of the accumulation type.
    pub scale: Option<Tensor>,
    /// (N, V), of the type of `dense`.
    pub dense: Option<Tensor>,
    /// Add to `input` instead of writing it; it then has the accumulation type.
    pub accumulate_input: bool,
}

impl Problem {
    /// N, D, V.
    pub fn sizes(&self) -> [usize; 3] {
        let input = self.input.shape();
        [input[0] * input[1], input[2], self.weight.shape()[0]]
    }

    /// Accumulation type.
    pub(crate) fn accumulator(&self) -> DType {
        self.input.dtype().accumulator()
    }

    /// Checks the operands against one another, whatever device they are on: no element is read.
    ///
    /// # Errors
    /// The first argument that does not fit.
    pub fn check_operands(&self, spec: &Spec) -> Result<()> {
        let (input, weight) = (&self.input, &self.weight);
        if input.shape().len() != 3 {
            return Err(input.misshapen("input", "3 axes (outer, inner, D)".into()));
        }
        if weight.shape().len() != 2 || weight.shape()[1] != input.shape()[2] {
            let expected = format!("(V, {}): one column for each feature", input.shape()[2]);
            return Err(weight.misshapen("weight", expected));
        }
        let floats = [DType::F32, DType::F64, DType::Bf16, DType::F16];
        input.expect_dtype("input", &floats)?;
        weight.expect_dtype("weight", &[input.dtype()])?;
        let [rows, _, classes] = self.sizes();
        if let Some(bias) = &self.bias {
            bias.expect_shape("bias", &[classes])?;
            bias.expect_dtype("bias", &[input.dtype()])?;
        }
        match &self.ids {
            Some(ids) => {
                ids.expect_shape("target", &[rows, spec.targets()])?;
                ids.expect_dtype("target", &[DType::I64])?;
                ids.expect_contiguous("target")?;
            }
            None if spec.targets() > 0 => {
                let expected = format!("({rows}, {}) class ids", spec.targets());
                return Err(Error::Missing { argument: "target", expected });
            }
            None => {}
        }
        if !self.logit_scale.is_finite() && !self.logit_scale.is_nan() {
            return value("logit_scale", self.logit_scale, "a finite number");
        }
        if !(self.softcap >= 0.0 && self.softcap.is_finite()) {
            return value("softcap", self.softcap, "a positive number, or 0 for none");
        }
        if spec.vectors() > 0 {
            let expected = format!("({}, {classes}) class vectors", spec.vectors());
            let vectors = self.vectors.ok_or(Error::Missing { argument: "vectors", expected })?;
            vectors.expect_shape("vectors", &[spec.vectors(), classes])?;
            vectors.expect_dtype("vectors", &[self.accumulator()])?;
        }
        if spec.position("dot").is_some() {
            let expected = format!("({rows}, {classes}) weights of the dot statistic");
            let dense = self.dense.ok_or(Error::Missing { argument: "dense", expected })?;
            dense.expect_shape("dense", &[rows, classes])?;
            dense.expect_dtype("dense", &floats)?;
        }
        Ok(())
    }

    fn check(&self, spec: &Spec, plan: &Plan) -> Result<()> {
        self.check_operands(spec)?;
        let [rows, features, classes] = self.sizes();
        if (plan.rows, plan.features, plan.classes, plan.dtype)
            != (rows, features, classes, self.input.dtype())
        {
            return Err(Error::Value {
                argument: "plan",
                value: format!("{:?}", (plan.rows, plan.features, plan.classes, plan.dtype)),
                expected: format!(
                    "one made for {:?}",
                    (rows, features, classes, self.input.dtype())
                ),
            });
        }
        self.check_ids(classes)
    }

    /// Finds the first id that is neither a class nor padding.
    fn check_ids(&self, classes: usize) -> Result<()> {
        let Some(ids) = &self.ids else { return Ok(()) };
        let columns = ids.shape()[1].max(1);
        // SAFETY: checked to be contiguous; the caller of the engine promised readable elements.
        let ids = unsafe { ids.slice::<i64>() };
        let wrong = |id: i64| !(0..classes as i64).contains(&id) && Some(id) != self.ignore_index;
        match ids.iter().position(|&id| wrong(id)) {
            Some(place) => Err(Error::Target { row: place / columns, value: ids[place], classes }),
            None => Ok(()),
        }
    }

    /// Checks outputs, or what a backward was given of them.
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn check_fields<'a>(
        &self,
        argument: &'static str,
        spec: &Spec,
        tensors: impl ExactSizeIterator<Item = Option<&'a Tensor>>,
    ) -> Result<()> {
        let rows = self.sizes()[0];
        if tensors.len() != spec.fields().len() {
            let names: Vec<_> = spec.fields().iter().map(|field| field.name).collect();
            return value(argument, tensors.len(), &format!("one tensor for each of {names:?}"));
        }
        for (field, tensor) in spec.fields().iter().zip(tensors) {
            if let Some(tensor) = tensor {
                tensor.expect_len(argument, rows * field.width())?;
                let dtype = if field.integer { DType::I64 } else { self.accumulator() };
                tensor.expect_dtype(argument, &[dtype])?;
                tensor.expect_contiguous(argument)?;
            }
        }
        Ok(())
    }
}

fn value<T>(argument: &'static str, value: impl ToString, expected: &str) -> Result<T> {
    Err(Error::Value { argument, value: value.to_string(), expected: expected.into() })
}

/// Checks the store against the plan; a store of no bytes may be left out.
fn check_store(store: Option<&Tensor>, plan: &Plan) -> Result<()> {
    if let Some(store) = store {
        store.expect_dtype("store", &[DType::U8])?;
        store.expect_len("store", plan.store_bytes)?;
        store.expect_contiguous("store")?;
    }
    Ok(())
}

/// The threads of a call: as asked, but none that has too little to do to be worth its wake-up.
fn threads(asked: usize, plan: &Plan, products: f64) -> usize {
    /// Multiplications that take a core about 50 µs: as long as it may take to wake one up.
    const WORTH: f64 = 4e6;
    let asked = if asked == 0 { pool::get_num_threads() } else { asked };
    let work = products * plan.rows as f64 * plan.features as f64 * plan.classes as f64;
    asked.min((work / WORTH) as usize).max(1)
}

/// Computes the statistics of `spec` for every row and writes them to `outputs`, one tensor for each
/// field: contiguous, in the accumulation type or i64. Skipped rows get 0, ids of −1.
///
/// With a `store` of `plan.store_bytes`, logits are kept there for the backward.
///
/// # Errors
/// Anything about the arguments that does not fit, found before any work; no scratch memory.
///
/// # Safety
/// Every tensor describes memory that stays valid for the call, and nobody else writes it; outputs
/// and store are writable and overlap nothing.
pub unsafe fn forward(
    spec: &Spec,
    problem: &Problem,
    outputs: &[Tensor],
    store: Option<Tensor>,
    plan: &Plan,
    threads_asked: usize,
) -> Result<()> {
    struct Call<'a>(forward_engine::Arguments<'a>);
    impl WithKernel for Call<'_> {
        type Output = Result<()>;
        fn with<K: Kernel>(self, kernel: K) -> Result<()> {
            forward_engine::run(kernel, &self.0)
        }
    }
    problem.check(spec, plan)?;
    problem.check_fields("outputs", spec, outputs.iter().map(Some))?;
    check_store(store.as_ref(), plan)?;
    let threads = threads(threads_asked, plan, 1.0);
    let arguments = forward_engine::Arguments { spec, problem, outputs, store, plan, threads };
    dispatch(problem.input.dtype(), Call(arguments))?
}

/// Turns cotangents of the outputs into gradients of the wanted operands.
///
/// `saved` are the outputs of the forward, `cotangents` as many tensors of the same shapes (`None`:
/// zero), `store` what the forward kept. Nothing of them is changed.
///
/// # Errors
/// As for [`forward`].
///
/// # Safety
/// As for [`forward`]; the gradients overlap nothing.
#[allow(clippy::too_many_arguments)]
pub unsafe fn backward(
    spec: &Spec,
    problem: &Problem,
    saved: &[Tensor],
    cotangents: &[Option<Tensor>],
    store: Option<Tensor>,
    gradients: &Gradients,
    plan: &Plan,
    threads_asked: usize,
) -> Result<()> {
    struct Call<'a>(backward_engine::Arguments<'a>);
    impl WithKernel for Call<'_> {
        type Output = Result<()>;
        fn with<K: Kernel>(self, kernel: K) -> Result<()> {
            backward_engine::run(kernel, &self.0)
        }
    }
    problem.check(spec, plan)?;
    problem.check_fields("saved", spec, saved.iter().map(Some))?;
    problem.check_fields("cotangents", spec, cotangents.iter().map(Option::as_ref))?;
    check_store(store.as_ref(), plan)?;
    check_gradients(spec, problem, cotangents, gradients, plan)?;
    let threads = threads(threads_asked, plan, 3.0);
    let arguments = backward_engine::Arguments {
        spec,
        problem,
        saved,
        cotangents,
        store: store.filter(|store| !store.is_empty()),
        gradients,
        plan,
        threads,
    };
    dispatch(problem.input.dtype(), Call(arguments))?
}

fn check_gradients(
    spec: &Spec,
    problem: &Problem,
    cotangents: &[Option<Tensor>],
    gradients: &Gradients,
    plan: &Plan,
) -> Result<()> {
    use crate::plan::wanted;
    let (dtype, acc) = (problem.input.dtype(), problem.accumulator());
    let mut mask = 0;
    if let Some(tensor) = &gradients.input {
        mask |= wanted::INPUT;
        tensor.expect_shape("d_input", problem.input.shape())?;
        let allowed = [acc, dtype];
        let allowed = if gradients.accumulate_input { &allowed[..1] } else { &allowed };
        tensor.expect_dtype("d_input", allowed)?;
    }
    if let Some(tensor) = &gradients.weight {
        mask |= wanted::WEIGHT;
        tensor.expect_shape("d_weight", problem.weight.shape())?;
        tensor.expect_dtype("d_weight", &[dtype, acc])?;
    }
    if let Some(tensor) = &gradients.bias {
        mask |= wanted::BIAS;
        tensor.expect_shape("d_bias", &[problem.sizes()[2]])?;
        tensor.expect_dtype("d_bias", &[dtype, acc])?;
    }
    if let Some(tensor) = &gradients.scale {
        mask |= wanted::SCALE;
        tensor.expect_len("d_scale", 1)?;
        tensor.expect_dtype("d_scale", &[acc])?;
    }
    if let Some(tensor) = &gradients.dense {
        mask |= wanted::DENSE;
        let Some(dense) = &problem.dense else {
            let expected = "the weights whose gradient is wanted".into();
            return Err(Error::Missing { argument: "dense", expected });
        };
        tensor.expect_shape("d_dense", dense.shape())?;
        tensor.expect_dtype("d_dense", &[dense.dtype()])?;
    }
    if mask & !plan.gradients != 0 {
        let expected = format!("a plan made for the gradients {mask:#07b}");
        return value("plan", format!("{:#07b}", plan.gradients), &expected);
    }
    let given = |name| spec.position(name).is_some_and(|place| cotangents[place].is_some());
    if (given("rest_entropy") || given("weighted_rest")) && spec.position("rest").is_none() {
        let expected = "`rest` among the statistics: the gradients of `entropy` and \
                        `weighted_rest` need it"
            .into();
        return Err(Error::Missing { argument: "statistics", expected });
    }
    Ok(())
}
