//! `acl add` and `acl rm`: the only commands that change who may use a service.

use clap::Subcommand;

use crate::model::query::Query;

#[derive(Debug, Subcommand)]
pub(super) enum AclVerb {
    /// List them
    #[command(alias = "ls")]
    List {
        /// Only those of this service
        service: Option<String>,
    },
    /// Let a source range in, or keep it out, from now on
    Add {
        /// The service's name
        service: String,
        /// A prefix or an address
        prefix: String,
        /// Keep it out
        #[arg(long)]
        deny: bool,
        /// Until so much time has passed, such as 10m or 2h [default: until it is removed]
        #[arg(long = "for", value_name = "TIME")]
        lifetime: Option<String>,
    },
    /// Take back what `acl add` gave
    #[command(alias = "remove", alias = "del", alias = "delete")]
    Rm {
        /// The service's name
        service: String,
        /// The prefix or address
        prefix: String,
    },
}

/// What a verb changes; `None` where it only lists.
pub(super) fn change(verb: &AclVerb) -> Option<Query> {
    Some(match verb {
        AclVerb::List { .. } => return None,
        AclVerb::Add { service, prefix, deny, lifetime } => {
            Query::AclAdd { service: service.clone(), prefix: prefix.clone(), deny: *deny, lifetime: lifetime.clone() }
        }
        AclVerb::Rm { service, prefix } => Query::AclRemove { service: service.clone(), prefix: prefix.clone() },
    })
}
