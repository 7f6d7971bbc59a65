//! How long it takes from an offer of three extents until their memory can be used.
//!
//! A software device with no doorbell delay, and a driver that polls it as fast as it can: what
//! is measured is the driver, from the fabric manager's call until the accepted event is there.
//! Prints p50, p99 and the maximum in microseconds.

#![forbid(unsafe_code)]

use std::error::Error;
use std::time::{Duration, Instant};

use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{ModelConfig, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;

const ROUNDS: usize = 1000;
const SIZES: [u64; 3] = [64 << 20, 32 << 20, 2 << 20];

fn main() -> Result<(), Box<dyn Error>> {
    let device = SoftwareDevice::new(ModelConfig::one_region(1 << 30))?;
    let mut fabric = device.fabric();
    let mut driver = DcDevice::open(device.mmio(), DeviceConfig::default())?;
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let offered = Orchestrator::add(&mut fabric, &SIZES, ExtentTag::NULL)?;
        while driver.accepted().len() < offered.len() {
            driver.poll()?;
        }
        times.push(started.elapsed());
        let ranges: Vec<_> = driver
            .accepted()
            .iter()
            .map(|extent| extent.range)
            .collect();
        driver.release(&ranges)?;
    }
    times.sort_unstable();
    let micros = |time: Duration| time.as_nanos() as f64 / 1000.0;
    println!(
        "offer of {} extents to usable: p50 {:.1} us, p99 {:.1} us, max {:.1} us ({ROUNDS} rounds)",
        SIZES.len(),
        micros(times[ROUNDS / 2]),
        micros(times[ROUNDS * 99 / 100]),
        micros(times[ROUNDS - 1]),
    );
    let limit = Duration::from_millis(5);
    if times[ROUNDS / 2] > limit {
        return Err(format!("p50 is above {limit:?}").into());
    }
    Ok(())
}
