#!/bin/sh
# Installs Slurm, munge and ip for the one-machine test cluster (Debian, Ubuntu; as root).
# --accounting: slurmdbd, MariaDB.
# Exit code 3: not possible here (no apt-get, not root); the caller then skips the tests that need it.
set -eu
packages="slurmctld slurmd slurm-client munge iproute2"
[ "${1:-}" != --accounting ] || packages="$packages slurmdbd mariadb-server-core mariadb-client-core"
have() { PATH=$PATH:/usr/sbin command -v "$1" >/dev/null; }
if have slurmctld && have slurmd && have sbatch && have munged && { have ip || [ "$(id -u)" != 0 ]; }; then
    [ "${1:-}" = --accounting ] || exit 0
    ! { have slurmdbd && have mariadbd && have mariadb-install-db; } || exit 0
fi
have apt-get && [ "$(id -u)" = 0 ] || { echo "install_slurm: needs root and apt-get: $packages" >&2; exit 3; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $packages >/dev/null
