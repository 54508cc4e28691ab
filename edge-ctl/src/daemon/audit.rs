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
        (shared.desired.clone(), seed)
    };
    let mut state = kernel.tables().state()?;
    // Only the maps are looked at.
    state.announced.clone_from(&desired.announcements);
    let plan = diff(&desired, &state, &Reserved::default(), &*table_filler(seed));
    // What only waits for its last flow, or rests, is as it should be; so are filter bits that go with it.
    let differs = |action: &&Action| !matches!(action, Action::FreeBackend { .. } | Action::FreeService { .. });
    let frees = plan.actions.iter().any(|action| !differs(&action));
    let actions =
        plan.actions.iter().filter(differs).filter(|action| !(frees && matches!(action, Action::SetFilter { .. })));
    let row = |action: &Action| AuditRow { write: action.kind().to_owned(), detail: format!("{action:?}") };
    let problem = |text: String| AuditRow { write: "problem".to_owned(), detail: text };
    Ok(actions.map(row).chain(plan.problems.into_iter().map(problem)).collect())
}
