//! Packs features into a dictionary, a panel at a time, in parallel.

use super::{Context, fill_pieces};
use crate::error::Result;
use crate::kernels::gemm::{Blank, Dictionary, Plan, Terms};

/// The dictionary of `n_features` features: `fill` writes those of panel `p`, row-major, and says what belongs to them.
///
/// # Errors
/// Those of `fill`; [`crate::Error::Refused`] when the system has less memory than the features take;
/// [`crate::Error::Cancelled`].
pub fn pack_features(
    plan: &Plan,
    n_features: usize,
    context: &Context<'_>,
    fill: impl Fn(usize, &mut [f32]) -> Result<Terms> + Sync,
) -> Result<Dictionary> {
    let mut blank = Blank::new(plan.clone(), n_features)?;
    fill_pieces(&mut blank.slots(), 1, context, |p, slots| {
        for slot in slots {
            let terms = fill(p, slot.features())?;
            slot.pack(&terms);
        }
        Ok(())
    })?;
    Ok(blank.finish())
}
