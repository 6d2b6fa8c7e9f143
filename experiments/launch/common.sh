# Sourced by the launch scripts: the line that all of them run, and the dry run.
# shellcheck shell=bash

# What dppo_jax.main exits with if it was stopped, has saved, and is not done:
# EXIT_INTERRUPTED of dppo_jax/command_line.py.
# shellcheck disable=SC2034  # Used by those who source this.
INTERRUPTED=143

# `die MESSAGE`: one line, and the exit code of a mistake.
die() {
  echo "error: $*" >&2
  exit 2
}

# `need NAME MEANING` for each setting that comes from the environment.
need() {
  [[ -n ${!1:-} ]] || die "$1 is not set: $2."
}

# `set_main FLAG...`: main=(python -m dppo_jax.main FLAG...), if it can work.
set_main() {
  local flag config='' workdir=''
  for flag in "$@"; do
    case $flag in
      --config=?*) config=$flag ;;
      --workdir=*://*)
        die "$flag is a URL; a run writes to a file system that all of its" \
          "hosts share. Mount it and give the path." ;;
      --workdir=?*) workdir=$flag ;;
    esac
  done
  [[ $config ]] || die 'which config? Add --config=configs/NAME.py.'
  [[ $workdir ]] || die 'where to? Add --workdir=FOLDER_ALL_HOSTS_SHARE.'
  # shellcheck disable=SC2034  # Used by those who source this.
  main=(python -m dppo_jax.main "$@")
}

# `quoted WORD...`: words as a shell reads them, quoted where they need it.
quoted() {
  local word separator=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./=:,@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# `act WORD...` runs a command, or prints it if DRY_RUN is set.
act() {
  if [[ ${DRY_RUN:-} ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}
