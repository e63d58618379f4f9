# What nvidia-smi says of every GPU: the fields $1 (comma-separated), without those that its driver does not know. The first line names the fields.
# Warnings and the reasons of a failure are lines between the rows.
# shellcheck shell=sh
fields=$1
while :; do
  output=$(nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits 2>&1)
  code=$?
  unknown=$(printf '%s\n' "$output" | sed -n 's/^Field "\([a-z_.]*\)" is not a valid field to query.*/\1/p' | head -n 1)
  known=$(printf '%s' "$fields" | tr ',' '\n' | grep -vxF -e "$unknown" | paste -sd , -)
  if [ -z "$unknown" ] || [ "$known" = "$fields" ] || [ -z "$known" ]; then break; fi
  fields=$known
done
printf 'fields: %s\n%s\n' "$fields" "$output"
exit "$code"
