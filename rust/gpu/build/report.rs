//! What ptxas says of each kernel, and the table of it that is checked in.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::Result;
use crate::manifest::{Arch, Job};
use crate::nvrtc::{Compiled, Kernel};

/// Reads the log of `--ptxas-options=-v`.
pub fn parse(log: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(Kernel {
                name,
                registers: 0,
                shared: 0,
                stack: 0,
                spill_stores: 0,
                spill_loads: 0,
            });
        } else if let Some(kernel) = kernels.last_mut() {
            let before = |what: &str| -> Option<u32> {
                line.split(what)
                    .next()
                    .filter(|head| head.len() < line.len())?
                    .split_whitespace()
                    .last()?
                    .parse()
                    .ok()
            };
            kernel.stack = before(" bytes stack frame").unwrap_or(kernel.stack);
            kernel.spill_stores = before(" bytes spill stores").unwrap_or(kernel.spill_stores);
            kernel.spill_loads = before(" bytes spill loads").unwrap_or(kernel.spill_loads);
            kernel.registers = before(" registers").unwrap_or(kernel.registers);
            kernel.shared = before(" bytes smem").unwrap_or(kernel.shared);
        }
    }
    kernels
}

/// The kernels of a PTX text; the driver assembles it, so nothing is known of their resources.
pub fn entries(ptx: &str) -> Vec<Kernel> {
    ptx.lines()
        .filter_map(|line| line.split(".entry ").nth(1))
        .map(|rest| rest.split(['(', ' ']).next().unwrap_or_default().to_owned())
        .map(|name| Kernel {
            name,
            registers: 0,
            shared: 0,
            stack: 0,
            spill_stores: 0,
            spill_loads: 0,
        })
        .collect()
}

/// Fails on a spill in a kernel declared spill-free, and compares or renews the checked table.
pub fn check(jobs: &[Job], images: &[Compiled], lock: &Path) -> Result<()> {
    let mut table = String::from(
        "# kernel arch registers static-shared stack spill-stores spill-loads (bytes); written by rust/gpu/build\n",
    );
    let mut spills = String::new();
    for (job, image) in jobs.iter().zip(images).filter(|(job, _)| job.arch != Arch::Compute80) {
        for k in &image.kernels {
            let numbers = format!(
                "{} {} {} {} {}",
                k.registers, k.shared, k.stack, k.spill_stores, k.spill_loads
            );
            writeln!(table, "{} {} {numbers}", k.name, job.arch.name())?;
            if job.spill_free && k.spill_stores + k.spill_loads > 0 {
                let (stores, loads) = (k.spill_stores, k.spill_loads);
                writeln!(
                    spills,
                    "{} ({}) is declared spill-free and spills {stores} + {loads} bytes",
                    k.name,
                    job.arch.name()
                )?;
            }
        }
    }
    if !spills.is_empty() {
        return Err(spills.into());
    }
    match env::var("LOGITLESS_KERNELS_LOCK").as_deref() {
        Ok("write") => fs::write(lock, table)?,
        Ok("check") if fs::read_to_string(lock).unwrap_or_default() != table => {
            return Err("rust/gpu/kernels.lock is out of date: build with LOGITLESS_KERNELS_LOCK=write and look at the difference".into());
        }
        _ => {}
    }
    Ok(())
}
