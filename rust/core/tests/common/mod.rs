//! A float64 dense reference of every statistic and gradient, and a driver of the engine beside it.

#![allow(dead_code)]

use half::{bf16, f16};
use logitless_core::{DType, Gradients, Memory, Plan, Problem, Result, Spec, Tensor, plan, wanted};

/// All statistics of the registry.
pub const ALL: [&str; 12] = [
    "rest",
    "target",
    "entropy",
    "sum",
    "sum_sq",
    "variance",
    "max",
    "rest_power",
    "weighted_sum",
    "weighted_rest",
    "dot",
    "topk",
];

/// A small deterministic generator.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0;
        (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// About standard normal.
    pub fn normal(&mut self) -> f64 {
        let mut uniform = || self.next() as f64 / (1u64 << 53) as f64;
        (0..12).map(|_| uniform()).sum::<f64>() - 6.0
    }
}

/// An array in any float type, with the values it holds after rounding.
pub struct Array {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub strides: Vec<isize>,
    bytes: Vec<u64>,
    len: usize,
}

impl Array {
    /// Row-major.
    pub fn new(dtype: DType, shape: &[usize]) -> Self {
        let mut strides = vec![1isize; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
        }
        Self::strided(dtype, shape, &strides)
    }

    /// Any strides that are not negative.
    pub fn strided(dtype: DType, shape: &[usize], strides: &[isize]) -> Self {
        let len: usize = 1 + shape
            .iter()
            .zip(strides)
            .map(|(&n, &s)| n.saturating_sub(1) * s as usize)
            .sum::<usize>();
        let bytes = vec![0x5a5a_5a5a_5a5a_5a5a; (len * dtype.size()).div_ceil(8)];
        Self { dtype, shape: shape.to_vec(), strides: strides.to_vec(), bytes, len }
    }

    pub fn filled(mut self, mut value: impl FnMut(usize) -> f64) -> Self {
        (0..self.count()).for_each(|i| self.set(i, value(i)));
        self
    }

    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    fn offset(&self, mut index: usize) -> usize {
        let mut offset = 0;
        for (&n, &s) in self.shape.iter().zip(&self.strides).rev() {
            offset += (index % n) * s as usize;
            index /= n;
        }
        assert!(offset < self.len);
        offset
    }

    pub fn get(&self, index: usize) -> f64 {
        let offset = self.offset(index);
        let start = self.bytes.as_ptr();
        // SAFETY: the offset lies inside the allocation of `len` elements.
        unsafe {
            match self.dtype {
                DType::F32 => f64::from(*start.cast::<f32>().add(offset)),
                DType::F64 => *start.cast::<f64>().add(offset),
                DType::Bf16 => f64::from(*start.cast::<bf16>().add(offset)),
                DType::F16 => f64::from(*start.cast::<f16>().add(offset)),
                DType::I64 => *start.cast::<i64>().add(offset) as f64,
                DType::U8 => f64::from(*start.cast::<u8>().add(offset)),
            }
        }
    }

    pub fn set(&mut self, index: usize, value: f64) {
        let offset = self.offset(index);
        let start = self.bytes.as_mut_ptr();
        // SAFETY: the offset lies inside the allocation of `len` elements.
        unsafe {
            match self.dtype {
                DType::F32 => *start.cast::<f32>().add(offset) = value as f32,
                DType::F64 => *start.cast::<f64>().add(offset) = value,
                DType::Bf16 => *start.cast::<bf16>().add(offset) = bf16::from_f64(value),
                DType::F16 => *start.cast::<f16>().add(offset) = f16::from_f64(value),
                DType::I64 => *start.cast::<i64>().add(offset) = value as i64,
                DType::U8 => *start.cast::<u8>().add(offset) = value as u8,
            }
        }
    }

    pub fn values(&self) -> Vec<f64> {
        (0..self.count()).map(|i| self.get(i)).collect()
    }

    /// All bytes, to compare bits.
    pub fn bits(&self) -> &[u64] {
        &self.bytes
    }

    pub fn tensor(&self) -> Tensor {
        let address = self.bytes.as_ptr().expose_provenance();
        Tensor::new(address, self.dtype, &self.shape, &self.strides).unwrap()
    }
}

/// A problem with all its operands.
pub struct Case {
    pub rows: usize,
    pub features: usize,
    pub classes: usize,
    pub dtype: DType,
    pub names: Vec<&'static str>,
    pub powers: Vec<f64>,
    pub vectors: usize,
    pub topk: usize,
    pub targets: usize,
    pub ignore: Option<i64>,
    pub scale: f64,
    pub softcap: f64,
    pub memory: Memory,
    pub threads: usize,
    pub input: Array,
    pub weight: Array,
    pub bias: Option<Array>,
    pub ids: Option<Array>,
    pub class_vectors: Array,
    pub dense: Array,
}

/// What a case gives: outputs by field and gradients by name.
pub struct Answer {
    pub outputs: Vec<(&'static str, Vec<f64>)>,
    pub gradients: Vec<(&'static str, Vec<f64>)>,
    pub bits: Vec<Vec<u64>>,
    /// Σ |dx u|, against which the gradient of the logit scale may cancel.
    pub magnitude: f64,
}

impl Case {
    pub fn new(seed: u64, dtype: DType, [rows, features, classes]: [usize; 3]) -> Self {
        let mut random = Random(seed);
        let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let (targets, spread) = (2, 1.5 / (features as f64).sqrt());
        let input = Array::new(dtype, &[1, rows, features]).filled(|_| random.normal());
        let weight = Array::new(dtype, &[classes, features]).filled(|_| random.normal() * spread);
        let bias = Array::new(dtype, &[classes]).filled(|_| random.normal());
        let ids = Array::new(DType::I64, &[rows, targets])
            .filled(|_| if random.below(5) == 0 { -100.0 } else { random.below(classes) as f64 });
        let class_vectors = Array::new(acc, &[2, classes]).filled(|_| random.normal());
        let dense = Array::new(dtype, &[rows, classes]).filled(|_| random.normal());
        Self {
            rows,
            features,
            classes,
            dtype,
            names: ALL.to_vec(),
            powers: vec![2.0, 0.5],
            vectors: 2,
            topk: 3.min(classes),
            targets,
            ignore: Some(-100),
            scale: 0.75,
            softcap: 6.0,
            memory: Memory::Lean,
            threads: 1,
            input,
            weight,
            bias: Some(bias),
            ids: Some(ids),
            class_vectors,
            dense,
        }
    }

    /// Cross entropy alone: no map, one target, the statistics that it needs.
    pub fn plain(seed: u64, dtype: DType, sizes: [usize; 3]) -> Self {
        let mut case = Self::new(seed, dtype, sizes);
        case.only(&["rest", "target"]);
        (case.scale, case.softcap, case.bias) = (1.0, 0.0, None);
        case
    }

    /// Keeps only some statistics.
    pub fn only(&mut self, names: &[&'static str]) {
        self.names = names.to_vec();
        let has = |name: &str| names.contains(&name);
        if !has("rest_power") {
            self.powers.clear();
        }
        if !has("weighted_sum") && !has("weighted_rest") {
            self.vectors = 0;
        }
        if !has("topk") {
            self.topk = 0;
        }
    }

    pub fn spec(&self) -> Spec {
        Spec::new(&self.names, &self.powers, self.vectors, self.topk, self.targets).unwrap()
    }

    pub fn acc(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    pub fn plan(&self) -> Plan {
        self.try_plan().unwrap()
    }

    pub fn try_plan(&self) -> Result<Plan> {
        let all = wanted::INPUT | wanted::WEIGHT | wanted::BIAS | wanted::SCALE | wanted::DENSE;
        let (spec, memory) = (self.spec(), self.memory);
        plan(&spec, self.rows, self.features, self.classes, self.dtype, memory, all, true)
    }

    pub fn problem(&self) -> Problem {
        Problem {
            input: self.input.tensor(),
            weight: self.weight.tensor(),
            bias: self.bias.as_ref().map(Array::tensor),
            ids: self.ids.as_ref().map(Array::tensor),
            ignore_index: self.ignore,
            logit_scale: self.scale,
            softcap: self.softcap,
            vectors: (self.vectors > 0).then(|| self.class_vectors.tensor()),
            dense: self.names.contains(&"dot").then(|| self.dense.tensor()),
        }
    }

    /// Cotangent of an element of a field.
    fn cotangent(&self, field: usize, index: usize) -> f64 {
        Random((field * 7919 + index * 104_729 + 1) as u64).normal()
    }

    /// Runs the engine, forward and backward.
    pub fn run(&self) -> Result<Answer> {
        let (spec, plan, problem) = (self.spec(), self.plan(), self.problem());
        let outputs: Vec<_> = spec
            .fields()
            .iter()
            .map(|field| {
                let dtype = if field.integer { DType::I64 } else { self.acc() };
                Array::new(dtype, &[self.rows, field.columns.max(1)])
            })
            .collect();
        let store = (plan.store_bytes > 0).then(|| Array::new(DType::U8, &[plan.store_bytes]));
        let tensors: Vec<_> = outputs.iter().map(Array::tensor).collect();
        let store_tensor = store.as_ref().map(Array::tensor);
        // SAFETY: all tensors describe arrays that live to the end of this function.
        unsafe {
            logitless_core::forward(&spec, &problem, &tensors, store_tensor, &plan, self.threads)?;
        }
        let cotangents: Vec<_> = spec
            .fields()
            .iter()
            .enumerate()
            .map(|(place, field)| {
                (!field.integer).then(|| {
                    Array::new(self.acc(), &[self.rows, field.columns.max(1)])
                        .filled(|index| self.cotangent(place, index))
                })
            })
            .collect();
        let acc = self.acc();
        let d_input = Array::strided(acc, &self.input.shape, &self.input.strides);
        let d_weight = Array::strided(acc, &self.weight.shape, &self.weight.strides);
        let d_bias = Array::new(acc, &[self.classes]);
        let d_scale = Array::new(acc, &[1]);
        let d_dense = Array::new(self.dtype, &[self.rows, self.classes]);
        let has_dot = self.names.contains(&"dot");
        let gradients = Gradients {
            input: Some(d_input.tensor()),
            weight: Some(d_weight.tensor()),
            bias: self.bias.as_ref().map(|_| d_bias.tensor()),
            scale: Some(d_scale.tensor()),
            dense: has_dot.then(|| d_dense.tensor()),
            accumulate_input: false,
        };
        let cotangent_tensors: Vec<_> =
            cotangents.iter().map(|array| array.as_ref().map(Array::tensor)).collect();
        // SAFETY: as above.
        unsafe {
            logitless_core::backward(
                &spec,
                &problem,
                &tensors,
                &cotangent_tensors,
                store_tensor,
                &gradients,
                &plan,
                self.threads,
            )?;
        }
        let mut list = vec![("input", &d_input), ("weight", &d_weight), ("scale", &d_scale)];
        if self.bias.is_some() {
            list.push(("bias", &d_bias));
        }
        if has_dot {
            list.push(("dense", &d_dense));
        }
        let bits = outputs.iter().chain(list.iter().map(|(_, array)| *array));
        Ok(Answer {
            magnitude: 0.0,
            bits: bits.map(|array| array.bits().to_vec()).collect(),
            outputs: spec
                .fields()
                .iter()
                .zip(&outputs)
                .map(|(field, array)| (field.name, array.values()))
                .collect(),
            gradients: list.into_iter().map(|(name, array)| (name, array.values())).collect(),
        })
    }

    /// The same in dense float64.
    pub fn reference(&self) -> Answer {
        let spec = self.spec();
        let (rows, features, classes) = (self.rows, self.features, self.classes);
        let (input, weight) = (self.input.values(), self.weight.values());
        let bias = self.bias.as_ref().map_or(vec![0.0; classes], Array::values);
        let ids = self.ids.as_ref().map_or(vec![], Array::values);
        let (vectors, dense) = (self.class_vectors.values(), self.dense.values());
        let mut outputs: Vec<(&'static str, Vec<f64>)> = spec
            .fields()
            .iter()
            .map(|field| (field.name, vec![0.0; rows * field.columns.max(1)]))
            .collect();
        let mut d_input = vec![0.0; rows * features];
        let mut d_weight = vec![0.0; classes * features];
        let (mut d_bias, mut d_scale) = (vec![0.0; classes], vec![0.0]);
        let mut d_dense = vec![0.0; rows * classes];
        let mut magnitude = 0.0;
        for row in 0..rows {
            let targets: Vec<Option<usize>> = (0..if ids.is_empty() { 0 } else { self.targets })
                .map(|column| {
                    let id = ids[row * self.targets + column];
                    (Some(id as i64) != self.ignore).then_some(id as usize)
                })
                .collect();
            if !targets.is_empty() && targets.iter().all(Option::is_none) {
                for (field, (_, out)) in spec.fields().iter().zip(&mut outputs) {
                    let width = field.columns.max(1);
                    let value = if field.integer { -1.0 } else { 0.0 };
                    out[row * width..(row + 1) * width].fill(value);
                }
                continue;
            }
            let u: Vec<f64> = (0..classes)
                .map(|class| {
                    (0..features)
                        .map(|k| input[row * features + k] * weight[class * features + k])
                        .sum()
                })
                .collect();
            let z: Vec<f64> = (0..classes)
                .map(|class| {
                    let x = self.scale * u[class] + bias[class];
                    if self.softcap > 0.0 { self.softcap * (x / self.softcap).tanh() } else { x }
                })
                .collect();
            let inside: Vec<bool> =
                (0..classes).map(|class| !targets.contains(&Some(class))).collect();
            let g = |name: &str, column: usize| {
                let place = spec.fields().iter().position(|f| f.name == name);
                place.map_or(0.0, |place| {
                    let width = spec.fields()[place].columns.max(1);
                    let rounded = Array::new(self.acc(), &[1])
                        .filled(|_| self.cotangent(place, row * width + column));
                    rounded.get(0)
                })
            };
            let mut set = |name: &str, column: usize, value: f64| {
                if let Some(place) = spec.fields().iter().position(|f| f.name == name) {
                    let width = spec.fields()[place].columns.max(1);
                    outputs[place].1[row * width + column] = value;
                }
            };
            let lse = |m: f64| {
                let top = (0..classes)
                    .filter(|&j| inside[j])
                    .map(|j| m * z[j])
                    .fold(f64::NEG_INFINITY, f64::max);
                if top == f64::NEG_INFINITY {
                    return top;
                }
                let sum: f64 =
                    (0..classes).filter(|&j| inside[j]).map(|j| (m * z[j] - top).exp()).sum();
                top + sum.ln()
            };
            let rest = lse(1.0);
            let r: Vec<f64> = (0..classes)
                .map(|j| {
                    let empty = rest == f64::NEG_INFINITY || !inside[j];
                    if empty { 0.0 } else { (z[j] - rest).exp() }
                })
                .collect();
            let over = |f: &dyn Fn(usize) -> f64| (0..classes).map(f).sum::<f64>();
            let entropy = over(&|j| if r[j] > 0.0 { r[j] * (rest - z[j]) } else { 0.0 });
            let mean = over(&|j| z[j]) / classes as f64;
            let mut order: Vec<usize> = (0..classes).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]).then(a.cmp(&b)));
            set("rest", 0, rest);
            set("rest_entropy", 0, entropy);
            set("sum", 0, over(&|j| z[j]));
            set("sum_sq", 0, over(&|j| z[j] * z[j]));
            set("mean", 0, mean);
            set("variance", 0, over(&|j| (z[j] - mean).powi(2)) / classes as f64);
            set("max", 0, z[order[0]]);
            set("argmax", 0, order[0] as f64);
            set("dot", 0, over(&|j| dense[row * classes + j] * z[j]));
            for (column, target) in targets.iter().enumerate() {
                set("target", column, target.map_or(0.0, |class| z[class]));
            }
            let powers: Vec<f64> = self.powers.iter().map(|&m| lse(m)).collect();
            for (column, &power) in powers.iter().enumerate() {
                set("rest_power", column, power);
            }
            let weighted: Vec<f64> =
                (0..self.vectors).map(|c| over(&|j| vectors[c * classes + j] * r[j])).collect();
            for c in 0..self.vectors {
                set("weighted_sum", c, over(&|j| vectors[c * classes + j] * z[j]));
                set("weighted_rest", c, weighted[c]);
            }
            for column in 0..self.topk {
                set("topk_values", column, z[order[column]]);
                set("topk_ids", column, order[column] as f64);
            }
            for j in 0..classes {
                let count = classes as f64;
                let mut dz = if r[j] > 0.0 {
                    r[j] * (g("rest", 0) - g("rest_entropy", 0) * (z[j] - (rest - entropy)))
                } else {
                    0.0
                };
                for c in 0..self.vectors {
                    let weight = vectors[c * classes + j];
                    dz += r[j] * g("weighted_rest", c) * (weight - weighted[c]);
                    dz += g("weighted_sum", c) * weight;
                }
                for (column, (&m, &power)) in self.powers.iter().zip(&powers).enumerate() {
                    if inside[j] {
                        dz += m * g("rest_power", column) * (m * z[j] - power).exp();
                    }
                }
                dz += g("sum", 0) + 2.0 * g("sum_sq", 0) * z[j] + g("mean", 0) / count;
                dz += 2.0 / count * g("variance", 0) * (z[j] - mean);
                dz += g("dot", 0) * dense[row * classes + j];
                d_dense[row * classes + j] = g("dot", 0) * z[j];
                for (column, target) in targets.iter().enumerate() {
                    if *target == Some(j) {
                        dz += g("target", column);
                    }
                }
                if order[0] == j {
                    dz += g("max", 0);
                }
                for (column, &class) in order[..self.topk].iter().enumerate() {
                    if class == j {
                        dz += g("topk_values", column);
                    }
                }
                let slope =
                    if self.softcap > 0.0 { 1.0 - (z[j] / self.softcap).powi(2) } else { 1.0 };
                let dx = dz * slope;
                d_bias[j] += dx;
                d_scale[0] += dx * u[j];
                magnitude += (dx * u[j]).abs();
                for k in 0..features {
                    d_input[row * features + k] += self.scale * dx * weight[j * features + k];
                    d_weight[j * features + k] += self.scale * dx * input[row * features + k];
                }
            }
        }
        let mut gradients = vec![("input", d_input), ("weight", d_weight), ("scale", d_scale)];
        if self.bias.is_some() {
            gradients.push(("bias", d_bias));
        }
        if self.names.contains(&"dot") {
            gradients.push(("dense", d_dense));
        }
        Answer { outputs, gradients, bits: Vec::new(), magnitude }
    }

    /// Compares the engine with the reference.
    pub fn check(&self) {
        let (ours, dense) = (self.run().unwrap(), self.reference());
        let (tight, loose) = match self.dtype {
            DType::F64 => (1e-11, 1e-10),
            DType::F32 => (2e-5, 1e-4),
            _ => (2e-5, 2e-2),
        };
        let pairs =
            [(&ours.outputs, &dense.outputs, tight), (&ours.gradients, &dense.gradients, loose)];
        for (values, expected, tolerance) in pairs {
            for ((name, a), (_, b)) in values.iter().zip(expected) {
                let scale =
                    b.iter().filter(|x| x.is_finite()).fold(1e-3, |m: f64, x| m.max(x.abs()));
                let scale = if *name == "scale" { scale.max(dense.magnitude) } else { scale };
                for (index, (a, b)) in a.iter().zip(b).enumerate() {
                    let same = a == b || (a.is_nan() && b.is_nan());
                    assert!(
                        same || (a - b).abs() <= tolerance * scale,
                        "{name}[{index}] = {a}, expected {b} (scale {scale}); {:?} {:?}",
                        [self.rows, self.features, self.classes],
                        self.dtype,
                    );
                }
            }
        }
    }
}
