# shellcheck shell=bash
# Sourced by the launchers: how they read flags, complain and show what they would run.
# The caller defines `usage`, which prints its flags.

# fail MESSAGE: what is wrong and how to put it right.
fail() {
  echo "error: $1" >&2
  echo "$(basename "$0") --help lists the flags" >&2
  exit 2
}

# read_flags FLAGS ARGUMENTS...: as far as --, sets the variable NAME to VALUE for --NAME=VALUE, and
# to 1 for --NAME. FLAGS names those of the script with spaces between, as --NAME= or --NAME.
# The caller gives the variables their defaults before, and drops `taken` arguments afterwards.
read_flags() {
  local flags=" $1 "
  shift
  taken=0
  while (($#)); do
    ((taken += 1))
    [[ "$1" != -- ]] || return 0
    [[ "$1" =~ ^--([a-z_]+)(=|$) && "$flags" == *" ${BASH_REMATCH[0]} "* ]] ||
      fail "$1: is not a flag of this script. Put flags of launch/train.py after --"
    case "${BASH_REMATCH[0]}" in
      --help)
        usage
        exit 0
        ;;
      *=) printf -v "${BASH_REMATCH[1]}" %s "${1#*=}" ;;
      *) printf -v "${BASH_REMATCH[1]}" 1 ;;
    esac
    shift
  done
}

# matching FLAG VALUE PATTERN RULE: fails unless VALUE is as the regular expression says.
matching() {
  [[ "$2" =~ ^($3)$ ]] || fail "$1=$2: $4"
}

# required FLAG VALUE EXAMPLE
required() {
  [[ -n "$2" ]] || fail "$1: is missing. Try $1=$3"
}

# flags_of_training ARGUMENTS...: what follows --, which has to name a configuration and a workdir.
flags_of_training() {
  local joined=" $* "
  [[ "$joined" == *" --config="* ]] || fail "nothing like --config=configs/mor.py after --"
  [[ "$joined" == *" --workdir="* ]] || fail "nothing like --workdir=DIR after --"
  [[ "$joined" != *" --distributed"* && "$joined" != *" --process"* ]] ||
    fail "--distributed and --process* are set by this launcher. Leave them out"
}

# quoted WORDS...: as a shell reads them back, spaces and all.
quoted() {
  local word out=()
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      out+=("$word")
    else
      out+=("'${word//\'/\'\\\'\'}'")
    fi
  done
  echo "${out[*]}"
}

# run WORDS...: runs a command, or prints it when dry_run is 1.
run() {
  # shellcheck disable=SC2154 # set by the caller
  if ((dry_run)); then
    quoted "$@"
  else
    "$@"
  fi
}
