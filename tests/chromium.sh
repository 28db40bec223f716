#!/bin/sh
# Installs Debian's Chromium for the browser tests where that is possible; says so in one line where it is not.
command -v chromium >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 && exit 0
fi
echo "Chromium is missing and could not be installed, so the browser tests are left out (Debian: apt-get install chromium)."
