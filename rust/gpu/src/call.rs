//! What a forward and a backward share: the checked problem in the kernels' terms.

use logitless_core::{DType, Error, Gradients, Problem, Spec, Tensor, wanted};

use crate::error::Result;
use crate::launch::{Stream, suffix};
use crate::layout::{ListBuffers, padded, pitch};
use crate::params::{self, AnyMatrix, Fields, RowList, RowView, Targets};
use crate::plan::Plan;
use crate::product::{LogitMap, Matrix};

/// A problem whose operands fit one another and the plan.
pub(crate) struct Call<'a> {
    pub spec: &'a Spec,
    pub problem: &'a Problem,
    pub plan: &'a Plan,
    pub stream: &'a Stream,
    pub rows: usize,
    pub features: usize,
    pub classes: usize,
    /// Type of the operands, and of sums over them.
    pub dtype: DType,
    pub acc: DType,
    pub weight: Matrix,
    /// logit_scale on the device, or 0.
    pub scale_at: usize,
}

impl<'a> Call<'a> {
    /// Checks everything that needs no element.
    pub fn new(
        spec: &'a Spec,
        problem: &'a Problem,
        scale: Option<&Tensor>,
        plan: &'a Plan,
        stream: &'a Stream,
    ) -> Result<Call<'a>> {
        problem.check_operands(spec)?;
        let [rows, features, classes] = problem.sizes();
        let (dtype, made) =
            (problem.input.dtype(), (plan.rows, plan.features, plan.classes, plan.dtype));
        if made != (rows, features, classes, dtype) {
            return Err(value(
                "plan",
                format!("{made:?}"),
                format!("one made for {:?}", (rows, features, classes, dtype)),
            ));
        }
        let weight = Matrix::of(&problem.weight);
        if plan.direct_weight && !weight.describable() {
            let expected = "a plan made with contiguous=False for a weight whose rows are not adjacent or not 16-byte aligned";
            return Err(value("plan", "contiguous=True".into(), expected.into()));
        }
        let acc = dtype.accumulator();
        if let Some(scale) = scale {
            scale.expect_dtype("logit_scale", &[acc])?;
            scale.expect_len("logit_scale", 1)?;
        }
        let scale_at = scale.map_or(0, Tensor::address);
        Ok(Call {
            spec,
            problem,
            plan,
            stream,
            rows,
            features,
            classes,
            dtype,
            acc,
            weight,
            scale_at,
        })
    }

    /// The ids of the targets.
    pub fn targets(&self) -> Targets {
        Targets {
            ids: self.problem.ids.as_ref().map_or(0, Tensor::address),
            ignore: self.problem.ignore_index.unwrap_or(0),
            columns: if self.problem.ids.is_some() { self.spec.targets() as i32 } else { 0 },
            has_ignore: i32::from(
                self.problem.ids.is_some() && self.problem.ignore_index.is_some(),
            ),
            classes: self.classes as i64,
        }
    }

    /// Every row, in its place.
    pub fn all_rows(&self) -> RowList {
        RowList { rows: 0, slots: 0, count: 0, total: self.rows as i64 }
    }

    /// The rows of a list that the device makes.
    pub fn live_rows(&self, buffers: ListBuffers) -> RowList {
        let ListBuffers { rows, slots, count, .. } = buffers;
        RowList { rows, slots, count, total: self.rows as i64 }
    }

    /// The input as rows of features.
    pub fn input(&self) -> RowView {
        row_view(&self.problem.input)
    }

    /// The input as one matrix, if a uniform row step describes it.
    pub fn input_matrix(&self) -> Option<Matrix> {
        let ((outer, outer_stride), (inner, inner_stride)) =
            (self.problem.input.axis(0), self.problem.input.axis(1));
        let row_stride = if inner == 1 { outer_stride } else { inner_stride };
        let uniform = outer <= 1 || inner <= 1 || outer_stride == inner as isize * inner_stride;
        uniform.then(|| Matrix {
            address: self.problem.input.address(),
            dtype: self.dtype,
            columns: self.features,
            row_stride: row_stride as i64,
            column_stride: self.problem.input.axis(2).1 as i64,
        })
    }

    /// Addresses of outputs, saved outputs or cotangents, by field.
    pub fn fields<'t>(&self, tensors: impl Iterator<Item = Option<&'t Tensor>>) -> Fields {
        let mut fields = Fields::default();
        for (field, tensor) in self.spec.fields().iter().zip(tensors) {
            if let (Some(slot), Some(tensor)) = (fields.slot(field.name), tensor) {
                *slot = tensor.address();
            }
        }
        fields
    }

    /// Whether the logits are more than scaled products.
    pub fn mapped(&self) -> bool {
        self.problem.bias.is_some() || self.problem.softcap > 0.0
    }

    /// From products to logits; `bias` in accumulators, or 0.
    pub fn map(&self, bias: usize) -> LogitMap {
        let (scale, softcap) = (self.problem.logit_scale, self.problem.softcap);
        LogitMap { scale, scale_at: self.scale_at, softcap, bias }
    }

    /// Copies live rows to the front of `packed`, zeros behind them.
    pub unsafe fn gather(&self, list: RowList, packed: Matrix, rows: usize) -> Result<()> {
        let name = format!("gather_rows_{}", self.dtype.size());
        let params = params::Gather {
            source: self.input(),
            list,
            packed: packed.address,
            pitch: packed.row_stride,
            features: self.features as i32,
            padded: rows as i32,
        };
        // SAFETY: the caller's promise about the call's tensors; `packed` has `rows` rows.
        unsafe { self.stream.launch(&name, (rows.div_ceil(8), 1), 256, 0, &params) }
    }

    /// Classes `first..first + count` of the weight, as products read them: in place, or copied into `copy`.
    pub unsafe fn weight_rows(
        &self,
        first: usize,
        count: usize,
        copy: Option<Matrix>,
    ) -> Result<Matrix> {
        let rows = self.weight.rows_from(first);
        let Some(copy) = copy else { return Ok(rows) };
        let source = RowView {
            data: rows.address,
            outer_stride: rows.row_stride,
            inner_stride: 0,
            feature_stride: rows.column_stride,
            inner: 1,
        };
        let list = RowList { total: count as i64, ..RowList::default() };
        let params = params::Gather {
            source,
            list,
            packed: copy.address,
            pitch: copy.row_stride,
            features: self.features as i32,
            padded: count as i32,
        };
        let name = format!("gather_rows_{}", self.dtype.size());
        // SAFETY: as above; the copy has room for the plan's chunk of classes.
        unsafe { self.stream.launch(&name, (count.div_ceil(8), 1), 256, 0, &params)? };
        Ok(copy)
    }

    /// The bias in accumulators at `out`, or nothing.
    pub unsafe fn widen_bias(&self, out: usize) -> Result<usize> {
        let Some(bias) = &self.problem.bias else { return Ok(0) };
        let params = params::Widen {
            source: vector(bias),
            out,
            length: self.classes as i64,
            is_double: i64::from(self.acc == DType::F64),
        };
        // SAFETY: as above; `out` has room for an accumulator a class.
        unsafe {
            self.stream.launch("widen_vector", (self.classes.div_ceil(256), 1), 256, 0, &params)?
        };
        Ok(out)
    }

    /// What every product of E Wᵀ is told: the rows, classes `first .. first + count`, and the logit map.
    /// `bias`: that of all classes in accumulators, or 0.
    pub fn logit_product(
        &self,
        list: RowList,
        bias: usize,
        first: usize,
        count: usize,
    ) -> params::Gemm {
        params::Gemm {
            count: list.count,
            bias: if bias == 0 { 0 } else { bias + self.acc.size() * first },
            m: self.rows as i32,
            n: count as i32,
            k: self.features as i32,
            ld_row: padded(self.rows) as i32,
            col0: first as i32,
            scale: self.problem.logit_scale as f32,
            scale_at: self.scale_at,
            softcap: self.problem.softcap as f32,
            ..params::Gemm::default()
        }
    }

    /// Logits of the target classes, to `out` (N, K); the first column also to the lists of slots.
    /// `pack`: 0, or where live rows are packed as by [`Call::gather`]. `gate`: 0, or the list of blocks of
    /// rows that a finish will add to, which is made empty. Ignored rows of `out` become 0.
    pub unsafe fn target_logits(
        &self,
        list: RowList,
        out: usize,
        reference: usize,
        target: usize,
        pack: usize,
        gate: usize,
    ) -> Result<()> {
        let targets = self.targets();
        let slots = padded(self.rows);
        let params = params::TargetLogits {
            input: self.input(),
            list,
            targets,
            weight: self.weight.any(),
            bias: self.problem.bias.as_ref().map_or_else(AnyMatrix::default, vector),
            out,
            reference,
            target,
            scale: self.problem.logit_scale,
            softcap: self.problem.softcap,
            scale_at: self.scale_at,
            packed: pack,
            pitch: pitch(self.features, self.dtype) as i64,
            in_place: 0,
            gate,
            features: self.features as i32,
            padded: slots as i32,
        };
        let name = format!("target_logits_{}", suffix(self.dtype));
        let warps = slots * targets.columns as usize;
        // SAFETY: as above; the lists have `slots` entries.
        unsafe { self.stream.launch(&name, (warps.div_ceil(8), 1), 256, 0, &params) }
    }

    /// Classes of the targets to `target`, one a row, whose logits the products write to `logits`; nan there
    /// for an id out of range. `pack` as for [`Call::target_logits`], unless the device says at `in_place`
    /// (0: never) that rows stay where they are.
    pub unsafe fn target_classes(
        &self,
        list: RowList,
        logits: usize,
        target: usize,
        pack: usize,
        in_place: usize,
    ) -> Result<()> {
        let slots = padded(self.rows);
        let params = params::TargetLogits {
            input: self.input(),
            list,
            targets: self.targets(),
            reference: logits,
            target,
            packed: pack,
            pitch: pitch(self.features, self.dtype) as i64,
            in_place,
            features: self.features as i32,
            padded: slots as i32,
            ..params::TargetLogits::default()
        };
        // SAFETY: as above; the lists have `slots` entries, and elements have two bytes.
        unsafe { self.stream.launch("target_classes_2", (slots.div_ceil(8), 1), 256, 0, &params) }
    }

    /// The parameters of the tile kernels that do not depend on the tile.
    pub fn tile_params(&self) -> params::Tile {
        let mut power = [0.0; params::MAX_POWERS];
        power.iter_mut().zip(self.spec.powers()).for_each(|(slot, &value)| *slot = value);
        let (vector_stride, vector_column) = self
            .problem
            .vectors
            .as_ref()
            .map_or((0, 0), |vectors| (vectors.axis(0).1 as i64, vectors.axis(1).1 as i64));
        params::Tile {
            targets: self.targets(),
            vectors: self.problem.vectors.as_ref().map_or(0, Tensor::address),
            vector_stride,
            vector_column,
            dense: self.problem.dense.as_ref().map_or_else(AnyMatrix::default, matrix),
            softcap: self.problem.softcap,
            mask: self.spec.statistics().map(params::statistic_bit).sum(),
            powers: self.spec.powers().len() as i32,
            vector_count: self.spec.vectors() as i32,
            topk: self.spec.topk() as i32,
            power,
            ..params::Tile::default()
        }
    }
}

/// A tensor (outer, inner, features) as rows.
pub(crate) fn row_view(tensor: &Tensor) -> RowView {
    RowView {
        data: tensor.address(),
        outer_stride: tensor.axis(0).1 as i64,
        inner_stride: tensor.axis(1).1 as i64,
        feature_stride: tensor.axis(2).1 as i64,
        inner: tensor.axis(1).0.max(1) as i64,
    }
}

/// A vector of any stride.
pub(crate) fn vector(tensor: &Tensor) -> AnyMatrix {
    let row_stride = tensor.axis(0).1 as i64;
    AnyMatrix { data: tensor.address(), row_stride, column_stride: 0, dtype: tensor.dtype() as i64 }
}

/// A matrix of any strides.
pub(crate) fn matrix(tensor: &Tensor) -> AnyMatrix {
    Matrix::of(tensor).any()
}

/// The error of an argument's value.
pub(crate) fn value(argument: &'static str, value: String, expected: String) -> crate::Error {
    Error::Value { argument, value, expected }.into()
}

/// Checks what a backward is to write, and that its plan has room for it.
pub(crate) fn check_gradients(
    call: &Call,
    gradients: &Gradients,
    accumulate_weight: bool,
) -> Result<()> {
    let (either, acc) = ([call.dtype, call.acc], [call.acc]);
    let mut bits = 0;
    let mut check =
        |bit, argument, tensor: Option<&Tensor>, shape: &[usize], dtypes: &[DType]| -> Result<()> {
            let Some(tensor) = tensor else { return Ok(()) };
            bits |= bit;
            tensor.expect_dtype(argument, dtypes)?;
            Ok(tensor.expect_shape(argument, shape)?)
        };
    let input = if gradients.accumulate_input { &acc[..] } else { &either };
    let weight = if accumulate_weight { &acc[..] } else { &either };
    check(wanted::INPUT, "d_input", gradients.input.as_ref(), call.problem.input.shape(), input)?;
    check(
        wanted::WEIGHT,
        "d_weight",
        gradients.weight.as_ref(),
        &[call.classes, call.features],
        weight,
    )?;
    check(wanted::BIAS, "d_bias", gradients.bias.as_ref(), &[call.classes], &either)?;
    if let Some(scale) = &gradients.scale {
        check(wanted::SCALE, "d_scale", Some(scale), scale.shape(), &acc)?;
        scale.expect_len("d_scale", 1)?;
    }
    if let (Some(d_dense), Some(dense)) = (&gradients.dense, &call.problem.dense) {
        check(
            wanted::DENSE,
            "d_dense",
            Some(d_dense),
            &[call.rows, call.classes],
            &[dense.dtype(), call.acc],
        )?;
        d_dense.expect_contiguous("d_dense")?;
    }
    if bits & !call.plan.gradients != 0 {
        let found = format!("gradients {:#b}", call.plan.gradients);
        return Err(value(
            "plan",
            found,
            format!("one made for the gradients {bits:#b} that are asked"),
        ));
    }
    Ok(())
}
