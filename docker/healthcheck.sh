#!/bin/bash
# HEALTHCHECK: a server must be alive; a tuning job is as healthy as its process.
set -f
port=${PORT:-80}
serving= previous=
for word in $(tr '\0' ' ' < /proc/1/cmdline); do
  case "$previous" in --port) port=$word ;; esac
  case "$word" in
    serve) serving=1 ;;
    inference_api.py | */inference_api.py) serving=1 port=5000 ;;
    --port=*) port=${word#--port=} ;;
  esac
  previous=$word
done
[ -n "$serving" ] || exit 0
exec curl -fsS --max-time 5 -o /dev/null "http://127.0.0.1:$port/livez"
