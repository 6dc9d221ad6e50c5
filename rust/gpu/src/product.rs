//! One matrix product: on tensor cores where a kernel and the layout allow it, plainly where not.

use logitless_core::{DType, Tensor};

pub(crate) use crate::choice::{Choice, choose, choose_gated, choose_sliced, exists, slices};
use crate::choice::{HeadStart, Idle};
use crate::driver::{Start, TensorMap, TensorMapSpec};
use crate::error::Result;
use crate::images;
use crate::launch::{Stream, suffix};
use crate::params::{self, AnyMatrix, RowList, RowView};

/// A matrix in device memory. Strides count elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub address: usize,
    pub dtype: DType,
    pub columns: usize,
    pub row_stride: i64,
    pub column_stride: i64,
}

impl Matrix {
    /// A tensor of two axes.
    pub fn of(tensor: &Tensor) -> Matrix {
        let ((_, row), (columns, column)) = (tensor.axis(0), tensor.axis(1));
        let (row_stride, column_stride) = (row as i64, column as i64);
        Matrix {
            address: tensor.address(),
            dtype: tensor.dtype(),
            columns,
            row_stride,
            column_stride,
        }
    }

    /// Adjacent columns, rows `pitch` apart.
    pub fn packed(address: usize, dtype: DType, columns: usize, pitch: usize) -> Matrix {
        Matrix { address, dtype, columns, row_stride: pitch as i64, column_stride: 1 }
    }

    /// Whether copies of 16 bytes can read its rows.
    pub fn describable(&self) -> bool {
        self.column_stride == 1
            && self.address.is_multiple_of(16)
            && self.row_stride >= self.columns as i64
            && self.row_stride * self.dtype.size() as i64 % 16 == 0
    }

    /// The matrix without its first rows.
    pub fn rows_from(self, first: usize) -> Matrix {
        let bytes = first as i64 * self.row_stride * self.dtype.size() as i64;
        Matrix { address: self.address.wrapping_add_signed(bytes as isize), ..self }
    }

    /// For kernels that read any type.
    pub fn any(&self) -> AnyMatrix {
        AnyMatrix {
            data: self.address,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
            dtype: self.dtype as i64,
        }
    }
}

/// What a product is for. The name is the kernel's; the operands' order in memory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Maximum and sum of exponentials for each class tile.
    OnlineRest,
    /// The same, and their first moment.
    Online,
    /// The same, and sum, squares and maximum over all classes.
    Statistics,
    /// The first for listed blocks of rows only.
    Repair,
    /// Exponentials against a fixed reference, and their sums.
    StoreExp,
    /// The same, and their first moment.
    StoreMoment,
    /// Gradient of the logits of a cross entropy.
    GradientCe,
    /// Gradient of the logits of every fused statistic.
    Gradient,
    /// The same, and sums over its rows and columns in float.
    GradientSums,
    /// The logits themselves.
    Logits,
    /// Gradient of the weight, in the operands' type.
    Dw,
    /// Gradient of the weight in float.
    DwF32,
    /// Gradient of the input in the operands' type, with row factors and the targets' part.
    De,
    /// Gradient of the input in float.
    DeF32,
}

// Every one is listed.
const _: () = assert!(Operation::ALL.len() == Operation::DeF32 as usize + 1);

impl Operation {
    pub const ALL: [Operation; 14] = [
        Operation::OnlineRest,
        Operation::Online,
        Operation::Statistics,
        Operation::Repair,
        Operation::StoreExp,
        Operation::StoreMoment,
        Operation::GradientCe,
        Operation::Gradient,
        Operation::GradientSums,
        Operation::Logits,
        Operation::Dw,
        Operation::DwF32,
        Operation::De,
        Operation::DeF32,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Operation::OnlineRest => "online_rest",
            Operation::Online => "online",
            Operation::Statistics => "statistics",
            Operation::Repair => "repair",
            Operation::StoreExp => "store_exp",
            Operation::StoreMoment => "store_moment",
            Operation::GradientCe => "gradient_ce",
            Operation::Gradient => "gradient",
            Operation::GradientSums => "gradient_sums",
            Operation::Logits => "logits",
            Operation::Dw => "dw",
            Operation::DwF32 => "dw_f32",
            Operation::De => "de",
            Operation::DeF32 => "de_f32",
        }
    }

    /// A kernel that does at least as much, with the same operands and results.
    pub fn general(self) -> Option<Operation> {
        match self {
            Operation::OnlineRest => Some(Operation::Online),
            Operation::GradientCe => Some(Operation::Gradient),
            _ => None,
        }
    }

    /// Whether clusters of its kernels may have a head start.
    fn uneven(self) -> bool {
        matches!(self, Operation::Dw | Operation::DwF32)
    }

    /// Whether A and B are stored with K as rows.
    fn transposed(self) -> (bool, bool) {
        match self {
            Operation::Dw | Operation::DwF32 => (true, true),
            Operation::De | Operation::DeF32 => (false, true),
            _ => (false, false),
        }
    }

    /// Whether a logit map with bias and softcap makes another kernel.
    pub fn mapped(self) -> bool {
        self.transposed() == (false, false)
    }
}

/// Operands of a product, as stored: K-major (rows of K), or with K as rows where the operation says so.
pub(crate) struct Operands {
    pub a: Matrix,
    pub b: Matrix,
    /// The result's memory. For statistics, which have none: A as the device may want it instead
    /// (`Gemm::in_place`), or nothing.
    pub d: Option<Matrix>,
}

/// How a product relates to the one right ahead of it on the stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// It waits for it.
    After,
    /// They share inputs at most, and neither touches what the other writes. The inputs were there
    /// before the one ahead was launched, or the first of a row of such products. This one starts on
    /// what the last wave of the one ahead leaves idle.
    Beside(Idle),
}

impl Order {
    /// Of one that may start beside an (m, n, k) product by `choice` in `slices` shares of k, which
    /// has just been enqueued; or has not, for lack of rows.
    pub fn beside(
        stream: &Stream,
        choice: &Choice,
        shape: (usize, usize, usize),
        slices: usize,
    ) -> Order {
        if shape.0 == 0 || shape.1 == 0 {
            return Order::After;
        }
        Order::Beside(choice.idle(&stream.device.facts, shape, slices))
    }
}

/// Enqueues a product on tensor cores. `epilogue` holds its extents and everything that the epilogue reads.
///
/// # Safety
/// Operands and epilogue describe device memory that is valid for the extents.
pub(crate) unsafe fn tensor_cores(
    stream: &Stream,
    operation: Operation,
    choice: &Choice,
    operands: &Operands,
    epilogue: params::Gemm,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { ordered(stream, Order::After, operation, choice, operands, epilogue) }
}

/// The same with an order.
///
/// # Safety
/// As for `tensor_cores`, and the order holds.
pub(crate) unsafe fn ordered(
    stream: &Stream,
    order: Order,
    operation: Operation,
    choice: &Choice,
    operands: &Operands,
    epilogue: params::Gemm,
) -> Result<()> {
    let (m, n, k) = (epilogue.m as usize, epilogue.n as usize, epilogue.k as usize);
    if m == 0 || n == 0 {
        return Ok(());
    }
    let Operands { a, b, d } = operands;
    let tile = choice.tile;
    let kernel = images::kernel(stream.device, choice.name)?;
    let slices = epilogue.slices.max(1) as usize;
    let tiles = choice.tiles(m, n) * slices;
    let at_once = (kernel.blocks / tile.cluster) as usize;
    let start = match order {
        Order::Beside(_) if choice.by_maps() => stream.device.start(Start::Beside),
        _ => Start::After,
    };
    let HeadStart { early, head } = match order {
        Order::Beside(idle) if start == Start::Beside && operation.uneven() => {
            HeadStart::of(choice, (m, n, k), at_once, idle)
        }
        _ => HeadStart::default(),
    };
    let params = params::Gemm {
        a: a.address,
        b: b.address,
        d: d.map_or(0, |d| d.address),
        lda: a.row_stride,
        ldb: b.row_stride,
        ldd: d.map_or(0, |d| d.row_stride),
        // Rows of a cluster in a raster group: 2048 rows.
        group: (2048 / (tile.m * tile.cluster)).max(1) as i32,
        early: early as i32,
        head: head as i32,
        ..epilogue
    };
    let launch = |maps: Option<&[TensorMap; 3]>| {
        // SAFETY: the caller's promise.
        unsafe {
            stream.launch_tiles(choice.name, kernel, tiles.min(at_once), start, maps, &params)
        }
    };
    if !choice.by_maps() {
        return launch(None);
    }
    let map = |matrix: &Matrix, columns: usize, rows: usize, tile: (u32, u32)| {
        let pitch = matrix.row_stride as usize * matrix.dtype.size();
        TensorMap::encode(TensorMapSpec {
            address: matrix.address,
            dtype: matrix.dtype,
            extent: (columns, rows),
            pitch,
            tile,
        })
    };
    let (a_rows_are_k, b_rows_are_k) = operation.transposed();
    let map_a = if a_rows_are_k { map(a, m, k, (64, 64))? } else { map(a, k, m, (64, tile.m))? };
    let map_b = if !b_rows_are_k {
        map(b, k, n, (64, tile.n / tile.cluster))?
    } else {
        // Each block of the cluster loads its share of the 64-column panels, or of every panel's rows.
        let shared_panels = (tile.n / 64).is_multiple_of(tile.cluster);
        map(b, n, k, (64, if shared_panels { 64 } else { 64 / tile.cluster }))?
    };
    let d_rows = if slices > 1 { slices * epilogue.slice_rows as usize } else { m };
    let map_d = match d {
        Some(whole) if epilogue.in_place != 0 => map(whole, k, m, (64, tile.m))?,
        Some(d) => map(d, n, d_rows, (if d.dtype == DType::F32 { 32 } else { 64 }, 64))?,
        None => map_a,
    };
    launch(Some(&[map_a, map_b, map_d]))
}

/// From products to logits. Addresses are 0 for none.
#[derive(Clone, Copy, Default)]
pub(crate) struct LogitMap {
    pub scale: f64,
    /// The scale on the device, in accumulators; it goes before `scale`.
    pub scale_at: usize,
    pub softcap: f64,
    pub bias: usize,
}

/// Extents and epilogue of a plain product.
#[derive(Clone, Copy, Default)]
pub(crate) struct PlainEpilogue {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub count: usize,
    pub count_is_k: bool,
    pub alpha: usize,
    pub accumulate: bool,
    /// What turns the products into logits.
    pub logits: Option<LogitMap>,
}

/// Enqueues a product without tensor cores, for any strides and types.
///
/// # Safety
/// As for `tensor_cores`.
pub(crate) unsafe fn plain(
    stream: &Stream,
    operation: Operation,
    operands: &Operands,
    epilogue: PlainEpilogue,
) -> Result<()> {
    let Operands { a, b, d } = operands;
    let d = d.expect("plain products store their result");
    let (a_rows_are_k, b_rows_are_k) = operation.transposed();
    let strides = |matrix: &Matrix, rows_are_k: bool| {
        if rows_are_k {
            (matrix.column_stride, matrix.row_stride)
        } else {
            (matrix.row_stride, matrix.column_stride)
        }
    };
    let ((a_m, a_k), (b_n, b_k)) = (strides(a, a_rows_are_k), strides(b, b_rows_are_k));
    let LogitMap { scale, scale_at, softcap, bias } = epilogue.logits.unwrap_or_default();
    let params = params::Plain {
        a: a.address,
        b: b.address,
        d: d.address,
        a_m,
        a_k,
        b_n,
        b_k,
        d_m: d.row_stride,
        d_n: d.column_stride,
        count: epilogue.count,
        alpha: epilogue.alpha,
        bias,
        scale_at,
        scale,
        softcap,
        m: epilogue.m as i32,
        n: epilogue.n as i32,
        k: epilogue.k as i32,
        count_is_k: i32::from(epilogue.count_is_k),
        accumulate: i32::from(epilogue.accumulate),
        logits: i32::from(epilogue.logits.is_some()),
    };
    let name = format!("plain_{}_{}", suffix(a.dtype), suffix(d.dtype));
    let grid = (epilogue.n.div_ceil(64), epilogue.m.div_ceil(64));
    // SAFETY: the caller's promise.
    unsafe { stream.launch(&name, grid, 256, 0, &params) }
}

/// Rounds the first `rows` rows of float sums to a matrix of any strides, or adds them to it.
///
/// # Safety
/// Both matrices have that many rows, valid until the stream has passed the call.
pub(crate) unsafe fn write_sums(
    stream: &Stream,
    sums: Matrix,
    out: Matrix,
    rows: usize,
    accumulate: bool,
) -> Result<()> {
    let params = params::Scatter {
        target: RowView {
            data: out.address,
            outer_stride: out.row_stride,
            inner_stride: 0,
            feature_stride: out.column_stride,
            inner: 1,
        },
        list: RowList { total: rows as i64, ..RowList::default() },
        packed: sums.address,
        pitch: sums.row_stride,
        features: sums.columns as i32,
        accumulate: i32::from(accumulate),
        ..params::Scatter::default()
    };
    let name = format!("scatter_rows_f32_{}", suffix(out.dtype));
    // SAFETY: the caller's promise.
    unsafe { stream.launch(&name, (params.blocks(), 1), 256, 0, &params) }
}
