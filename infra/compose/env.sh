#!/bin/sh
# usage: env.sh [FILE]: makes the .env of the Compose stack, with secrets of its own, where there is none, and refuses one
# that still has a placeholder of .env.example.
set -eu

file=${1:-.env}
random() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -e "$file" ]; then
  umask 077
  cat >"$file.part" <<END
# Secrets of this machine's Compose stack. .env.example lists what else can be set here.
POSTGRES_PASSWORD=$(random 24)
MONGO_PASSWORD=$(random 24)
S3_ACCESS_KEY=$(random 10)
S3_SECRET_KEY=$(random 24)
DASHBOARD_KEY=mlk_$(random 6)_$(random 32)
# In this name the dashboard and the command line approve and correct.
MEDLOOP_PERSON=$(id -un)
END
  mv "$file.part" "$file"
  echo "$file is new: it holds this stack's secrets, and nobody else can read it." >&2
fi

left=$(sed -n 's/^[[:space:]]*\(export \)\{0,1\}\([A-Za-z_][A-Za-z0-9_]*\)=.*change-me.*/\2/p' "$file" | tr '\n' ' ')
if [ -n "$left" ]; then
  echo "Still a placeholder in $file: ${left% }. Anybody could know it; give a secret of your own: openssl rand -hex 24" >&2
  exit 3
fi
