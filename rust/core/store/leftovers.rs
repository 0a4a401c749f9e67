//! What a stopped writer can have left in the folder of a store. Nothing else is ever removed.
//!
//! The first manifest is durable before the first step begins. So without a manifest there is no step; and beside one that
//! names `n` steps, what a writer can have left behind is number `n`.

use std::path::Path;

use crate::error::{Error, Result};
use crate::store::manifest::{MANIFEST, step_name};

/// File that the writer locks.
pub const LOCK: &str = "LOCK";
/// Folder of the stores of sparse codes that belong to a store.
const CODES: &str = "codes";
/// What marks a file or folder in flight; the writer's process number follows.
pub const IN_FLIGHT: &str = ".tmp-";

/// Refuses a folder without a manifest that holds what no writer can have left there.
///
/// # Errors
/// [`Error::Store`].
pub fn refuse_foreign(names: &[String], root: &Path) -> Result<()> {
    let ours = |name: &str| name == LOCK || name == CODES || in_flight(name) == Some(MANIFEST);
    match names.iter().find(|name| !ours(name)) {
        Some(foreign) => {
            let reason = format!("not a store: expected an empty folder, found {foreign:?}");
            Err(Error::Store { path: root.into(), reason })
        }
        None => Ok(()),
    }
}

/// Refuses a step behind number `steps`: its manifest has been lost, or it is no step.
///
/// # Errors
/// [`Error::Store`].
pub fn refuse_unnamed_steps(names: &[String], steps: usize, root: &Path) -> Result<()> {
    let unnamed = |name: &str| name.parse().is_ok_and(|i: usize| i > steps && step_name(i) == name);
    match names.iter().find(|name| unnamed(name)) {
        Some(found) => {
            let reason = format!(
                "cannot resume: expected no step behind {:?}, found {found:?}. Put back the manifest that names it, or move it away",
                step_name(steps)
            );
            Err(Error::Store { path: root.into(), reason })
        }
        None => Ok(()),
    }
}

/// Whether a writer that was stopped beside a manifest of `steps` steps can have left `name`.
pub fn is_leftover(name: &str, steps: usize) -> bool {
    let step = step_name(steps);
    name == step || in_flight(name).is_some_and(|stem| stem == MANIFEST || stem == step)
}

/// What is in flight under `name`, if something is.
fn in_flight(name: &str) -> Option<&str> {
    let (stem, pid) = name.split_once(IN_FLIGHT)?;
    (!pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit())).then_some(stem)
}
