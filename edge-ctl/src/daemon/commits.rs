//! Every way to another configuration: reload, `config commit`, and the rollback of one that nobody confirmed. All of them
//! parse, validate, compare and apply; on any error the running configuration stays.

use std::collections::BTreeMap;

use tracing::{error, info, warn};

use super::{Daemon, acl, commit::Texts, lock};
use crate::{
    config::{
        self, ConfigError,
        diff::{self, Changes, Touched},
        valid::Config,
    },
    model::query::{ConfigChange, ConfigVerb, ReloadRow, ViewError},
    notify,
    state_file::StateFileError,
};

fn invalid(error: &ConfigError) -> ViewError {
    ViewError::Invalid(error.lines())
}

fn unwritten(error: &StateFileError) -> ViewError {
    ViewError::Internal(format!("nothing was changed: {error}"))
}

impl Daemon {
    /// Reads the files and puts them in force.
    pub(super) async fn reload(&mut self) -> Result<ReloadRow, ViewError> {
        if let Some(seconds) = self.commits.remaining() {
            return Err(ViewError::Invalid(vec![format!(
                "a commit waits to be confirmed and rolls back in {seconds} s: `edge-ctl config commit` keeps it, `edge-ctl \
                 config rollback` takes it back; then reload"
            )]));
        }
        let texts = self.files()?;
        let row = self.apply_texts(&texts).await?;
        if let Err(error) = self.commits.clear() {
            warn!(%error, "an earlier commit would come back at the next start");
        }
        Ok(row)
    }

    pub(super) async fn change_config(&mut self, change: ConfigChange) -> Result<ReloadRow, ViewError> {
        let ConfigChange { verb, files } = change;
        match verb {
            ConfigVerb::Diff => {
                let texts = files.map_or_else(|| self.files(), Ok)?;
                let new = config::parse_texts(&texts).map_err(|error| invalid(&error))?;
                Ok(self.row(&texts, &new, diff::changes(&self.config, &new)))
            }
            ConfigVerb::Commit(confirm) => {
                let texts = files.map_or_else(|| self.files(), Ok)?;
                self.commit(&texts, confirm).await
            }
            ConfigVerb::Confirm => self.confirm(),
            ConfigVerb::Rollback => self.roll_back().await,
        }
    }

    async fn commit(&mut self, texts: &Texts, confirm: Option<u64>) -> Result<ReloadRow, ViewError> {
        // Refused before anything is noted.
        config::parse_texts(texts).map_err(|error| invalid(&error))?;
        let running = lock(&self.shared).texts.clone();
        let files = self.files().unwrap_or_default();
        let until = confirm.map(|seconds| acl::now().saturating_add(seconds));
        self.commits.begin(texts, &running, &files, until).map_err(|error| unwritten(&error))?;
        match self.apply_texts(texts).await {
            Ok(mut row) => {
                row.confirm_within = confirm;
                row.note = (confirm.is_none() && files != *texts).then(not_in_the_files);
                Ok(row)
            }
            Err(error) => {
                // The one before is in force; a later rollback to it changes nothing.
                if let Err(error) = self.commits.roll_back(&files) {
                    warn!(%error, "a commit that failed is noted as in force");
                }
                Err(error)
            }
        }
    }

    fn confirm(&mut self) -> Result<ReloadRow, ViewError> {
        if self.commits.remaining().is_none() {
            let help = "`edge-ctl config commit FILE` puts a file in force, `edge-ctl reload` the files of the start";
            return Err(ViewError::Invalid(vec![format!("nothing waits to be confirmed; {help}")]));
        }
        let files = self.files().unwrap_or_default();
        let differs = self.commits.confirm(&files).map_err(|error| unwritten(&error))?;
        info!("the configuration was confirmed");
        let texts = lock(&self.shared).texts.clone();
        let mut row = self.row(&texts, &self.config, Changes::default());
        row.note = differs.then(not_in_the_files);
        Ok(row)
    }

    async fn roll_back(&mut self) -> Result<ReloadRow, ViewError> {
        let files = self.files().unwrap_or_default();
        let before = self.commits.roll_back(&files).map_err(|error| unwritten(&error))?;
        let Some(before) = before else {
            return Err(ViewError::Invalid(vec![
                "nothing waits to be confirmed, so there is nothing to take back".into(),
            ]));
        };
        self.apply_texts(&before).await
    }

    /// The time has passed.
    pub(super) async fn roll_back_in_time(&mut self) {
        match self.roll_back().await {
            Ok(_) => warn!("nobody confirmed the configuration in time: the one before is in force again"),
            Err(error) => {
                error!(%error, "the configuration could not be rolled back; trying again");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    fn files(&self) -> Result<Texts, ViewError> {
        let file = lock(&self.shared).file.clone();
        config::read_texts(&file).map_err(|error| invalid(&error))
    }

    /// The one way to another configuration.
    async fn apply_texts(&mut self, texts: &Texts) -> Result<ReloadRow, ViewError> {
        notify::reloading();
        let result = match config::parse_texts(texts) {
            Ok(new) => {
                let row = self.row(texts, &new, diff::changes(&self.config, &new));
                self.apply_config(new).await.map(|_| row)
            }
            Err(error) => Err(invalid(&error)),
        };
        notify::ready("serving");
        let row = result?;
        lock(&self.shared).texts.clone_from(texts);
        info!(changes = row.changes.len(), "configuration reloaded");
        Ok(row)
    }

    fn row(&self, texts: &Texts, new: &Config, changes: Changes) -> ReloadRow {
        let file = texts.first().map(|(file, _)| file.display().to_string()).unwrap_or_default();
        let mut flows: BTreeMap<String, u64> = BTreeMap::new();
        // Without the counts the changes are told all the same.
        for row in self.kernel.service_rows().unwrap_or_default() {
            *flows.entry(row.name).or_default() += row.active;
        }
        let touches = diff::touches(&self.config, new).into_iter().map(|touched| match touched {
            Touched::Service { name, what } => {
                format!("service {name}: {what} ({} established flows)", flows.get(&name).copied().unwrap_or(0))
            }
            Touched::Session { peer, what } => format!("session {peer}: {what}"),
        });
        let Changes { applied, needs_restart } = changes;
        ReloadRow { file, changes: applied, needs_restart, touches: touches.collect(), ..ReloadRow::default() }
    }
}

fn not_in_the_files() -> String {
    "the files still say otherwise: put it there too, since `reload` reads them".to_owned()
}
