//! The command line of `darter-manager`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use darter_daemon::telemetry;
use darter_types::{NodeName, Role};

use crate::{ApiRole, ApiScope};

/// The cluster's CA, its members, and orders to preheat images.
#[derive(Parser)]
#[command(version)]
pub struct Flags {
    /// The configuration; the sample file manager.toml shows every key [default: /etc/darter/manager.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    pub log_format: telemetry::LogFormat,
    /// What is logged; DARTER_LOG takes precedence.
    #[arg(long, default_value = "info")]
    pub log: String,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What else it does than to serve.
#[derive(Subcommand)]
pub enum Command {
    /// Prints a new join token. As the user of the manager (runuser -u darter-manager), on its machine, whether it runs or not.
    Token {
        /// What its users may be: scheduler, seed or node.
        #[arg(long, value_parser = member_role)]
        role: Role,
        /// How long it may be used, for example 30m, 1h or 7d.
        #[arg(long, default_value = "1h", value_parser = crate::parse_life)]
        ttl: Duration,
        /// How many members may join with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
    },
    /// Lets a join token take the name of a member that was there, for a machine that was installed anew. As the user of the
    /// manager, on its machine, whether it runs or not.
    Release {
        /// What the member is: scheduler, seed or node.
        #[arg(long, value_parser = member_role)]
        role: Role,
        /// Its name.
        #[arg(value_name = "NAME")]
        node: NodeName,
        /// Also when it was there a moment ago: two machines of one name keep throwing each other out.
        #[arg(long)]
        force: bool,
    },
    /// Makes, lists and removes tokens for the REST API. As the user of the manager, on its machine, whether it runs or not.
    ApiToken {
        #[command(subcommand)]
        action: ApiTokenAction,
    },
}

/// The manager's own role can't be had by a token.
fn member_role(text: &str) -> Result<Role, String> {
    let role = text.parse().ok().filter(|role| *role != Role::Manager);
    role.ok_or_else(|| format!("{text:?} is not a role of a member: scheduler, seed or node"))
}

/// What is to happen with API tokens.
#[derive(Subcommand)]
pub enum ApiTokenAction {
    /// Prints a new token. It is shown this once: the database has its hash only.
    Add {
        /// What it is for, in lists and in the audit log.
        name: String,
        /// reader: looks; operator: also orders and cancels preheats (scope preheats) and sets limits (scope nodes); admin:
        /// also puts members out (scope nodes) and makes tokens (scopes join-tokens, api-tokens).
        #[arg(long)]
        role: ApiRole,
        /// The parts of the API that it is for, with commas: preheats, nodes, join-tokens, api-tokens [default: all]
        #[arg(long, value_name = "SCOPES", value_delimiter = ',')]
        scope: Vec<ApiScope>,
        /// How long it may be used: 366 days at most. After that requests with it are refused.
        #[arg(long, default_value = "90d", value_parser = crate::parse_life)]
        ttl: Duration,
    },
    /// Prints all tokens: id, name, what each may do, until when.
    List,
    /// Takes a token away; from then on it is refused.
    Remove {
        /// As `list` shows it.
        id: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_that_can_be_had_by_a_token_are_offered() {
        assert_eq!(member_role("seed"), Ok(Role::Seed));
        for bad in ["manager", "king", ""] {
            assert!(member_role(bad).unwrap_err().ends_with("scheduler, seed or node"), "{bad}");
        }
    }
}
