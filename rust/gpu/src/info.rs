//! What there is to run on, and why not.

use crate::driver::{self, driver};
use crate::error::Result;
use crate::images::{self, Arch, candidates};

/// One device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The images that it runs, best first: a cubin's target, or PTX that the driver compiles.
    pub images: Vec<&'static str>,
}

/// What `logitless info` prints.
#[derive(Clone, Debug)]
pub struct Info {
    /// Why CUDA tensors cannot be used; empty when they can.
    pub reason: String,
    /// The driver's interface version, as it counts: 12040 is 12.4. 0 without a driver.
    pub driver: i32,
    /// The visible devices.
    pub devices: Vec<DeviceInfo>,
    /// Embedded images: target, kernels, bytes.
    pub images: Vec<(&'static str, usize, usize)>,
}

/// Looks at the driver, the devices and the images of this build.
pub fn info() -> Info {
    let inventory = images::inventory();
    let has = |arch: Arch| inventory.iter().any(|entry| entry.0 == arch);
    let mut info = Info {
        reason: images::absent().into(),
        driver: 0,
        devices: Vec::new(),
        images: inventory
            .iter()
            .map(|&(arch, _, kernels, bytes)| (arch.name(), kernels, bytes))
            .collect(),
    };
    match driver() {
        Ok(driver) => {
            info.driver = driver.version;
            for ordinal in 0..driver.devices as usize {
                match driver::device(ordinal) {
                    Ok(device) => {
                        let facts = &device.facts;
                        info.devices.push(DeviceInfo {
                            name: facts.name.clone(),
                            capability: facts.capability,
                            multiprocessors: facts.multiprocessors,
                            images: candidates(facts.capability)
                                .iter()
                                .filter(|&&arch| has(arch))
                                .map(|arch| arch.name())
                                .collect(),
                        });
                    }
                    Err(error) => info.reason = error.to_string(),
                }
            }
            if info.reason.is_empty() && info.devices.is_empty() {
                info.reason = "the driver sees no device".into();
            }
        }
        Err(error) if info.reason.is_empty() => info.reason = error.to_string(),
        Err(_) => {}
    }
    info
}

/// Loads every kernel that a device may need, so that nothing is left to do in a graph capture.
pub fn warm_up(device: usize) -> Result<()> {
    let device = driver::device(device)?;
    let _current = device.enter()?;
    images::load_all(device)
}
