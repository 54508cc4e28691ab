//! `map audit`: the maps as they are, against what should be in them. Reads only; the reconciler repairs by itself.

use super::{SharedState, lock, start::table_filler};
use crate::{
    datapath::kernel_view::KernelView,
    model::query::{AuditRow, ViewError},
    reconcile::{
        diff::{Reserved, diff},
        ports::Action,
    },
};

/// One row for each write that would be needed, and for each thing that cannot be done.
pub(super) fn audit(shared: &SharedState, kernel: &KernelView) -> Result<Vec<AuditRow>, ViewError> {
    let (desired, seed) = {
        let shared = lock(shared);
        let seed = shared.datapath.seed().map_err(|error| ViewError::Internal(error.to_string()))?;
        (std::sync::Arc::clone(&shared.desired), seed)
    };
    let mut state = kernel.tables().state()?;
    // Only the maps are looked at.
    state.announced.clone_from(&desired.announcements);
    // Whatever only waits for its last flow, or rests, is as it should be, with all that goes with it.
    let resting = Reserved {
        backends: state.backends.keys().copied().collect(),
        services: state.services.keys().copied().collect(),
        ..Reserved::default()
    };
    let plan = diff(&desired, &state, &resting, &*table_filler(seed));
    let row = |action: &Action| AuditRow { write: action.kind().to_owned(), detail: format!("{action:?}") };
    let problem = |text: String| AuditRow { write: "problem".to_owned(), detail: text };
    Ok(plan.actions.iter().map(row).chain(plan.problems.into_iter().map(problem)).collect())
}
