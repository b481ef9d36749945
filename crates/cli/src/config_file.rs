//! `kilotok serve --config FILE`: a TOML file whose keys are the names of flags.
//!
//! Owns the one order of precedence: a flag wins over its `KILOTOK_` variable, the variable over the
//! file, the file over the default. A value of the file becomes the flag's default, so that it is read
//! and checked as the flag is. Refuses: keys that are no flag, tables, and a file that names another.

use std::path::Path;

use anyhow::Result;
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use crate::args::{self, Cli};
use crate::failure::bad_input;

/// The command line with what its configuration file says.
pub(crate) fn resolve(cli: Cli) -> Result<Cli> {
    let file = match &cli.command {
        args::Command::Serve(serve) => serve.config.clone(),
        _ => None,
    };
    let Some(file) = file else { return Ok(cli) };
    let command = with_defaults(Cli::command(), &read(&file)?, &file)?;
    let parsed = command.try_get_matches();
    let parsed = parsed.and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.or_else(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        let line = line.strip_prefix("error: ").unwrap_or(line);
        bad_input(format!("{}: {line}", file.display()))
    })
}

fn read(file: &Path) -> Result<Table> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => return bad_input(format!("--config {}: {error}", file.display())),
    };
    text.parse::<Table>().or_else(|error| {
        let line = error
            .span()
            .map_or(0, |span| text[..span.start].lines().count().max(1));
        bad_input(format!(
            "{}:{line}: {}",
            file.display(),
            error.message().replace('\n', " ")
        ))
    })
}

fn with_defaults(mut command: Command, table: &Table, file: &Path) -> Result<Command> {
    for (key, value) in table {
        let id = key.replace('-', "_");
        let serve = command.find_subcommand("serve");
        let known = serve.and_then(|serve| serve.get_arguments().find(|arg| *arg.get_id() == *id));
        let refuse = |why: String| bad_input(format!("{}: `{key}`: {why}", file.display()));
        let flag = match known {
            Some(_) if ["config", "help", "version"].contains(&id.as_str()) => {
                return refuse("not for a file".to_owned());
            }
            Some(flag) => flag,
            None => return refuse("expected the name of a flag of `kilotok serve`".to_owned()),
        };
        let values = match texts(flag, value) {
            Ok(values) => values,
            Err(why) => return refuse(why),
        };
        command = command.mut_subcommand("serve", |serve| {
            serve.mut_arg(&id, |arg| arg.default_values(values))
        });
    }
    Ok(command)
}

/// A value as the flag would get it.
fn texts(flag: &Arg, value: &Value) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(flag) => Ok(flag.to_string()),
        other => Err(format!(
            "expected a text, number or boolean, found {}",
            other.type_str()
        )),
    };
    let is_switch = matches!(flag.get_action(), ArgAction::SetTrue);
    match value {
        Value::Array(list) if flag.get_value_delimiter().is_some() => {
            list.iter().map(one).collect()
        }
        Value::Array(_) => Err("expected one value, found a list".to_owned()),
        Value::Boolean(_) => Ok(vec![one(value)?]),
        _ if is_switch => Err(format!(
            "expected true or false, found {}",
            value.type_str()
        )),
        _ => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::ServeArgs;

    fn serve(file: &str, flags: &[&str]) -> Result<ServeArgs> {
        let path = Path::new("k.toml");
        let command = with_defaults(Cli::command(), &file.parse().unwrap(), path)?;
        let args = [&["kilotok", "serve"], flags].concat();
        let matches = command.try_get_matches_from(args)?;
        match Cli::from_arg_matches(&matches)?.command {
            args::Command::Serve(serve) => Ok(*serve),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = "port = 9000\nmax-num-seqs = 3\nno_page = true\nmodel = \"m\"\n\
                    allowed-origins = [\"a\", \"b\"]\ndraft-width = 4";
        let args = serve(file, &["--port", "1"]).unwrap();
        assert_eq!((args.port, args.max_num_seqs, args.seats.seats), (1, 3, 0));
        assert_eq!(args.allowed_origins, ["a", "b"]);
        assert!(args.no_page && !args.log_json);
        assert_eq!(args.model.model.as_deref(), Some(Path::new("m")));
    }

    #[test]
    fn what_is_no_flag_or_no_value_of_it_is_refused() {
        for file in [
            "ports = 1",
            "port = [1]",
            "port = \"x\"",
            "port = 99999999",
            "no-page = 1",
            "max-num-seqs = 0",
            "config = \"other\"",
            "model = {a = 1}",
        ] {
            assert!(serve(file, &[]).is_err(), "{file}");
        }
    }

    #[test]
    fn the_example_is_good() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let text = std::fs::read_to_string(root.join("deploy/kilotok.toml")).unwrap();
        serve(&text, &[]).unwrap();
        // Every line that is commented out as well.
        let all: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# ").or(Some(line)))
            .filter(|line| line.contains(" = "))
            .collect();
        assert!(all.len() > 15);
        serve(&all.join("\n"), &[]).unwrap();
    }
}
