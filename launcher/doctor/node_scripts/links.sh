# Each network interface, its state, MTU and speed in Mbit/s (left out where the kernel does not know it).
# shellcheck shell=sh
cd /sys/class/net || exit
for name in *; do
  echo "$name $(cat "$name/operstate") $(cat "$name/mtu") $(cat "$name/speed" 2>/dev/null)"
done
