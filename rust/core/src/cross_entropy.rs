//! Plain cross entropy in one call: statistics, row losses and their reduction.
//!
//! Anything can be composed from [`crate::forward`] and [`crate::backward`] on vectors of length N.
//! The most common loss of all, on a small batch, spends longer on those few vector operations in
//! its framework than in the engine; here they are one loop. With d = rest − target,
//!
//! ```text
//! ℓ = log(1 + eᵈ) + λ lse²        lse = max(rest, target) + log(1 + e^−|d|)
//! ∂ℓ/∂rest = σ(d) (1 + 2λ lse)    ∂ℓ/∂target = −σ(d) + 2λ lse σ(−d)
//! ```
//!
//! which keeps every digit of a confident row: d = −87 gives e⁻⁸⁷, not 0. Rows are computed in f64
//! and summed in row order, so the bits do not depend on threads.

use crate::element::{DType, Real};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::spec::Spec;
use crate::tensor::Tensor;
use crate::{Gradients, Problem};
use std::sync::OnceLock;

/// What becomes of the losses of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// They are the result; 0 for ignored rows.
    None,
    /// Their sum over the number of kept rows: nan where no row is kept.
    Mean,
    /// Their sum.
    Sum,
}

/// The loss of a row, `log(1 + e^(rest − target)) + z_weight · lse²`, and its reduction.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// How rows are reduced.
    pub reduction: Reduction,
    /// λ, the weight of the squared log-sum-exp.
    pub z_weight: f64,
}

/// The statistics of the rows: what the forward keeps for the backward.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// (N,)
    pub rest: Tensor,
    /// (N, 1)
    pub target: Tensor,
}

impl CrossEntropy {
    /// The statistics that it is made of: `rest`, and the logit of one target.
    pub fn spec() -> &'static Spec {
        static SPEC: OnceLock<Spec> = OnceLock::new();
        SPEC.get_or_init(|| match Spec::new(&["rest", "target"], &[], 0, 0, 1) {
            Ok(spec) => spec,
            Err(error) => unreachable!("both statistics are registered: {error}"),
        })
    }

    /// Writes `saved` and `loss`; returns the number of kept rows.
    ///
    /// `loss` is contiguous, with an element for each row without reduction and one element with.
    ///
    /// # Errors
    /// As for [`crate::forward`].
    ///
    /// # Safety
    /// As for [`crate::forward`].
    pub unsafe fn forward(
        &self,
        problem: &Problem,
        saved: &Saved,
        loss: &Tensor,
        store: Option<Tensor>,
        plan: &Plan,
        threads: usize,
    ) -> Result<usize> {
        loss.expect_len("loss", if self.reduction == Reduction::None { plan.rows } else { 1 })?;
        loss.expect_dtype("loss", &[problem.input.dtype().accumulator()])?;
        loss.expect_contiguous("loss")?;
        let outputs = [saved.rest, saved.target];
        // SAFETY: the caller's promise. The engine has checked dtypes and shapes when it returns,
        // and outputs are written in full: all that the row loop reads is there.
        unsafe {
            crate::forward(Self::spec(), problem, &outputs, store, plan, threads)?;
            Ok(match loss.dtype() {
                DType::F64 => self.losses::<f64>(Rows::new(problem, saved, plan.rows)?, loss),
                _ => self.losses::<f32>(Rows::new(problem, saved, plan.rows)?, loss),
            })
        }
    }

    /// Gradients from `grad_loss`, which has the shape of the loss and any strides.
    ///
    /// # Errors
    /// As for [`crate::backward`].
    ///
    /// # Safety
    /// As for [`crate::backward`].
    #[expect(clippy::too_many_arguments, reason = "those of `crate::backward`")]
    pub unsafe fn backward(
        &self,
        problem: &Problem,
        saved: &Saved,
        grad_loss: &Tensor,
        store: Option<Tensor>,
        gradients: &Gradients,
        plan: &Plan,
        threads: usize,
    ) -> Result<()> {
        grad_loss.expect_len(
            "grad_loss",
            if self.reduction == Reduction::None { plan.rows } else { 1 },
        )?;
        grad_loss.expect_dtype("grad_loss", &[problem.input.dtype().accumulator()])?;
        // SAFETY: the caller's promise; `saved` is what the forward wrote.
        unsafe {
            match grad_loss.dtype() {
                DType::F64 => {
                    let rows = Rows::<f64>::new(problem, saved, plan.rows)?;
                    let cotangents = self.cotangents(rows, grad_loss);
                    run_backward(problem, saved, &cotangents, store, gradients, plan, threads)
                }
                _ => {
                    let rows = Rows::<f32>::new(problem, saved, plan.rows)?;
                    let cotangents = self.cotangents(rows, grad_loss);
                    run_backward(problem, saved, &cotangents, store, gradients, plan, threads)
                }
            }
        }
    }

    /// Writes the losses of the rows or their reduction; returns the number of kept rows.
    ///
    /// # Safety
    /// `loss` was checked: contiguous, of type `A`, and long enough.
    unsafe fn losses<A: Real>(&self, rows: Rows<'_, A>, loss: &Tensor) -> usize {
        let loss = loss.pointer::<A>();
        let (mut sum, mut kept) = (0.0, 0);
        for row in 0..rows.ids.len() {
            let value = rows.get(row).map(|row| row.loss(self.z_weight));
            kept += usize::from(value.is_some());
            sum += value.unwrap_or(0.0);
            if self.reduction == Reduction::None {
                // SAFETY: one element a row, as checked.
                unsafe { *loss.add(row) = A::from_f64(value.unwrap_or(0.0)) };
            }
        }
        let total = if self.reduction == Reduction::Mean { sum / kept as f64 } else { sum };
        if self.reduction != Reduction::None {
            // SAFETY: one element, as checked.
            unsafe { *loss = A::from_f64(total) };
        }
        kept
    }

    /// Cotangents of `rest`, then of `target`.
    ///
    /// # Safety
    /// `grad_loss` was checked: of type `A`, one element or one a row, and readable.
    unsafe fn cotangents<A: Real>(&self, rows: Rows<'_, A>, grad_loss: &Tensor) -> Vec<A> {
        let count = rows.ids.len();
        let step = match (self.reduction, grad_loss.strides()) {
            (Reduction::None, [step]) => *step,
            _ => 0,
        };
        let kept = || (0..count).filter(|&row| rows.get(row).is_some()).count();
        let share = if self.reduction == Reduction::Mean { 1.0 / kept() as f64 } else { 1.0 };
        let mut cotangents = vec![A::ZERO; 2 * count];
        let (rest, target) = cotangents.split_at_mut(count);
        for index in 0..count {
            let Some(row) = rows.get(index) else { continue };
            // SAFETY: one element a row at this step, or one for all rows.
            let g = unsafe { *grad_loss.pointer::<A>().offset(index as isize * step) };
            let (g_rest, g_target) = row.gradient(self.z_weight);
            let g = g.to_f64() * share;
            rest[index] = A::from_f64(g * g_rest);
            target[index] = A::from_f64(g * g_target);
        }
        cotangents
    }
}

/// Hands the cotangents to the engine.
///
/// # Safety
/// As for [`crate::backward`].
unsafe fn run_backward<A: Real>(
    problem: &Problem,
    saved: &Saved,
    cotangents: &[A],
    store: Option<Tensor>,
    gradients: &Gradients,
    plan: &Plan,
    threads: usize,
) -> Result<()> {
    let rows = plan.rows;
    let address = |at: usize| cotangents[at..].as_ptr().expose_provenance();
    let rest = Tensor::new(address(0), A::DTYPE, &[rows], &[1])?;
    let target = Tensor::new(address(rows), A::DTYPE, &[rows, 1], &[1, 1])?;
    let (saved, cotangents) = ([saved.rest, saved.target], [Some(rest), Some(target)]);
    let spec = CrossEntropy::spec();
    // SAFETY: the caller's promise; the cotangents outlive the call.
    unsafe { crate::backward(spec, problem, &saved, &cotangents, store, gradients, plan, threads) }
}

/// The statistics of the rows as slices.
#[derive(Clone, Copy)]
struct Rows<'a, A> {
    ids: &'a [i64],
    ignore_index: Option<i64>,
    rest: &'a [A],
    target: &'a [A],
}

impl<A: Real> Rows<'_, A> {
    /// # Errors
    /// No ids, or a shape or dtype that does not fit.
    ///
    /// # Safety
    /// The tensors' elements are readable and initialised.
    unsafe fn new(problem: &Problem, saved: &Saved, rows: usize) -> Result<Self> {
        let Some(ids) = problem.ids else {
            let expected = "one class id a row".into();
            return Err(Error::Missing { argument: "ids", expected });
        };
        ids.expect_dtype("ids", &[DType::I64])?;
        let tensors = [("ids", &ids), ("rest", &saved.rest), ("target", &saved.target)];
        for (name, tensor) in tensors {
            tensor.expect_len(name, rows)?;
            tensor.expect_contiguous(name)?;
        }
        for (name, tensor) in &tensors[1..] {
            tensor.expect_dtype(name, &[A::DTYPE])?;
        }
        let ignore_index = problem.ignore_index;
        // SAFETY: checked to be contiguous, of these types and `rows` long; else the caller's
        // promise.
        Ok(unsafe {
            Self {
                ids: ids.slice(),
                ignore_index,
                rest: saved.rest.slice(),
                target: saved.target.slice(),
            }
        })
    }

    /// The row, unless it is ignored.
    fn get(&self, row: usize) -> Option<Row> {
        let kept = Some(self.ids[row]) != self.ignore_index;
        let (rest, target) = (self.rest[row].to_f64(), self.target[row].to_f64());
        kept.then_some(Row { rest, target })
    }
}

/// One kept row.
#[derive(Clone, Copy)]
struct Row {
    rest: f64,
    target: f64,
}

impl Row {
    fn lse(self) -> f64 {
        self.rest.max(self.target) + (-(self.rest - self.target).abs()).exp().ln_1p()
    }

    /// `rest - target`; nan with a logit of +inf, whose softmax is inf/inf, as in torch.
    fn margin(self) -> f64 {
        let infinite = self.rest == f64::INFINITY || self.target == f64::INFINITY;
        if infinite { f64::NAN } else { self.rest - self.target }
    }

    fn loss(self, z_weight: f64) -> f64 {
        let d = self.margin();
        // `max` drops a nan, the second term keeps it.
        let loss = d.max(0.0) + (-d.abs()).exp().ln_1p();
        if z_weight == 0.0 { loss } else { loss + z_weight * self.lse().powi(2) }
    }

    /// Derivatives by `rest` and `target`.
    fn gradient(self, z_weight: f64) -> (f64, f64) {
        let d = self.margin();
        let (wrong, right) = (sigmoid(d), sigmoid(-d));
        if z_weight == 0.0 {
            return (wrong, -wrong);
        }
        let g_lse = 2.0 * z_weight * self.lse();
        (wrong + g_lse * wrong, g_lse * right - wrong)
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confident_rows_keep_their_digits() {
        let row = Row { rest: -87.0, target: 0.0 };
        let expected = (-87.0f64).exp();
        assert!((row.loss(0.0) / expected - 1.0).abs() < 1e-15);
        assert!((row.gradient(0.0).0 / expected - 1.0).abs() < 1e-15);
    }

    #[test]
    fn a_row_without_other_classes_costs_nothing() {
        let row = Row { rest: f64::NEG_INFINITY, target: 3.0 };
        assert_eq!((row.loss(0.0), row.gradient(0.0)), (0.0, (0.0, 0.0)));
        assert_eq!(row.loss(0.5), 0.5 * 9.0);
        assert_eq!(row.gradient(0.5), (0.0, 3.0));
    }

    #[test]
    fn infinities_and_nan_propagate() {
        let masked = Row { rest: 0.0, target: f64::NEG_INFINITY };
        assert_eq!((masked.loss(0.0), masked.gradient(0.0)), (f64::INFINITY, (1.0, -1.0)));
        for row in [
            Row { rest: f64::NAN, target: 0.0 },
            Row { rest: 0.0, target: f64::NAN },
            Row { rest: f64::INFINITY, target: 0.0 },
            Row { rest: 0.0, target: f64::INFINITY },
        ] {
            assert!(row.loss(0.0).is_nan() && row.gradient(0.0).0.is_nan());
        }
    }

    #[test]
    fn gradients_are_those_of_the_loss() {
        for (rest, target, z) in [(1.0, 2.5, 0.0), (3.0, -1.0, 0.1), (-0.5, -0.25, 2.0)] {
            let loss = |rest, target| Row { rest, target }.loss(z);
            let step = 1e-6;
            let (g_rest, g_target) = Row { rest, target }.gradient(z);
            let by_rest = (loss(rest + step, target) - loss(rest - step, target)) / (2.0 * step);
            let by_target = (loss(rest, target + step) - loss(rest, target - step)) / (2.0 * step);
            assert!((g_rest - by_rest).abs() < 1e-8 && (g_target - by_target).abs() < 1e-8);
        }
    }
}
