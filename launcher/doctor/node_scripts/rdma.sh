# Each port of each RDMA device (device, port, state, link layer), and the device files by which a program uses them.
# shellcheck shell=sh
for port in /sys/class/infiniband/*/ports/*; do
  [ -e "$port/state" ] || continue
  device=${port#/sys/class/infiniband/}
  echo "port ${device%%/*} ${port##*/} $(sed 's/.*: *//' "$port/state") $(cat "$port/link_layer" 2>/dev/null)"
done
for file in /dev/infiniband/uverbs*; do
  if [ -e "$file" ]; then echo "file $file"; fi
done
