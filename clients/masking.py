"""Secure aggregation at a site: keys, shares of secrets, masks, and the arithmetic of sums that are exact.

Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning, CCS 2017, with Flower's
primitives (ECDH on P-384, Fernet, Shamir). Every two sites agree on a mask that one adds and the other subtracts, so
that masks cancel in the sum; each site adds one more of its own. Shares of the secrets behind both lie at the other
sites: for a site that answered they give its own mask, for one that was lost the masks it had with others, never both.
Bell et al., CCS 2020 (SecAgg+) let each site share with a few others only, which pays off from hundreds of sites on;
hospitals are tens, so all share with all.

Flower's own expansion of masks (`pseudo_rand_gen`) is not used: it folds the 256 bits of a key into 32, few enough to
try them all. The masks here are the key stream of AES-256 in counter mode.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from clients.policy import Refused

WIDE = 2.0**38
"""Largest number in sums of features, second moments, losses and counts."""
Keys = tuple[bytes, bytes]
"""Public keys of a site, PEM: for masks, and for the messages in which sites hand each other shares."""


def more_than_half(sites: int) -> int:
    """The smallest threshold that is safe: two groups of sites cannot both reach it."""
    return sites // 2 + 1


@dataclass
class Party:
    """What a site keeps between the legs of one sum, and forgets after the last.

    Attributes:
        sum: Name of the sum.
        node: The site.
        mask_key: Private, PEM; shares of it go to the others.
        share_key: Private, PEM; never leaves.
        seed: Of the site's own mask, 32 bytes; empty before the shares are made.
        threshold: Shares that bring a secret back.
        keys: Of every site that takes part.
        shares: Of the seed and of the mask key of each site, as far as they came here; the own ones too.
        masked: Whether the answer went out.
    """

    sum: str
    node: int
    mask_key: bytes
    share_key: bytes
    seed: bytes = b""
    threshold: int = 0
    keys: dict[int, Keys] | None = None
    shares: dict[int, tuple[bytes, bytes]] | None = None
    masked: bool = False

    @classmethod
    def new(cls, name: str, node: int) -> tuple[Party, Keys]:
        """Fresh keys for a sum: the private ones stay here."""
        (mask, mask_public), (share, share_public) = generate_key_pairs(), generate_key_pairs()
        party = cls(name, node, private_key_to_bytes(mask), private_key_to_bytes(share))
        return party, (public_key_to_bytes(mask_public), public_key_to_bytes(share_public))

    def make_shares(self, keys: Mapping[int, Keys], threshold: int) -> dict[int, bytes]:
        """Share both secrets among the sites; each share is encrypted for its site.

        Raises:
            Refused: The coordinator proposes something under which one site's numbers could be seen.
        """
        if self.keys is not None:
            raise Refused("the shares of this sum are made already")
        mine = keys.get(self.node)
        own = tuple(
            public_key_to_bytes(bytes_to_private_key(key).public_key()) for key in (self.mask_key, self.share_key)
        )
        if mine != own or len({key for pair in keys.values() for key in pair}) != 2 * len(keys):
            raise Refused("the keys of the sites are not those that they made")
        if len(keys) < 2 or not more_than_half(len(keys)) <= threshold <= len(keys):
            raise Refused(
                f"a sum of {len(keys)} sites with threshold {threshold}",
                expected="at least two sites and more than half of them as threshold",
            )  # fmt: skip
        self.keys, self.threshold, self.seed = dict(keys), threshold, os.urandom(32)
        nodes = sorted(keys)
        pieces = {
            node: pair
            for node, *pair in zip(
                nodes, create_shares(self.seed, threshold, len(nodes)),
                create_shares(self.mask_key, threshold, len(nodes)), strict=True,
            )
        }  # fmt: skip
        self.shares = {self.node: (pieces[self.node][0], pieces[self.node][1])}
        return {
            node: encrypt(self._channel(node), share_keys_plaintext_concat(self.node, node, *pieces[node]))
            for node in nodes
            if node != self.node
        }

    def take_shares(self, sealed: Mapping[int, bytes]) -> None:
        """Open the shares of the others; from now on those are the sites of the sum.

        Raises:
            Refused: A share is forged, or too few came.
        """
        if self.shares is None or self.keys is None or self.masked:
            raise Refused("this sum is not at that point")
        for node, text in sealed.items():
            try:
                source, target, seed_share, key_share = share_keys_plaintext_separate(
                    decrypt(self._channel(node), text)
                )
            except (InvalidToken, InvalidTag, KeyError) as error:
                raise Refused(f"the share of node {node} cannot be opened") from error
            if (source, target) != (node, self.node):
                raise Refused(f"the share of node {node} is for another")
            self.shares[node] = seed_share, key_share
        if len(self.shares) < self.threshold:
            raise Refused(f"{len(self.shares)} sites are left in the sum", expected=f"at least {self.threshold}")

    def mask(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays, uint32 or uint64, under all masks of this site."""
        if self.shares is None or self.masked:
            raise Refused("this sum is not at that point")
        self.masked = True
        others = [node for node in self.shares if node != self.node]
        pairs = {node: pair_key(self.mask_key, self.keys[node][0]) for node in others}  # type: ignore[index]
        added = [self.seed, *(pairs[node] for node in others if node > self.node)]
        return add_masks(arrays, added, [pairs[node] for node in others if node < self.node])

    def reveal(self, active: Iterable[int], lost: Iterable[int]) -> dict[int, bytes]:
        """Shares of the seeds of the sites that answered, and of the mask keys of those that were lost.

        Raises:
            Refused: Somebody is in both lists or in none, or so few answered that the sum would tell of them.
        """
        active, lost = set(active), set(lost)
        if not self.masked or self.shares is None:
            raise Refused("this sum is not at that point")
        if active & lost or active | lost != set(self.shares) or self.node not in active:
            raise Refused("the sites of the sum are not those that began it")
        if len(active) < self.threshold:
            raise Refused(f"{len(active)} sites answered", expected=f"at least {self.threshold}")
        return {node: self.shares[node][0 if node in active else 1] for node in sorted(self.shares)}

    def _channel(self, node: int) -> bytes:
        assert self.keys is not None
        return generate_shared_key(bytes_to_private_key(self.share_key), bytes_to_public_key(self.keys[node][1]))


def pair_key(private: bytes, public: bytes) -> bytes:
    """The 32 bytes that two sites agree on, from one's private and the other's public key, both PEM."""
    return base64.urlsafe_b64decode(generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public)))


def add_masks(
    arrays: Mapping[str, np.ndarray], added: Iterable[bytes], subtracted: Iterable[bytes]
) -> dict[str, np.ndarray]:
    """Arrays with the masks of some keys added and of others subtracted, modulo 2^32 or 2^64."""
    found = {name: arrays[name].copy() for name in sorted(arrays)}
    for keys, sign in ((added, 1), (subtracted, -1)):
        for key in keys:
            stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()  # a key masks one sum only
            for array in found.values():
                mask = np.frombuffer(stream.update(bytes(array.nbytes)), array.dtype).reshape(array.shape)
                (np.add if sign > 0 else np.subtract)(array, mask, out=array)
    return found


def seed_digest(seed: bytes) -> bytes:
    """SHA-256 of a site's seed, which it says beforehand, so that forged shares of it are seen; it tells nothing."""
    return hashlib.sha256(seed).digest()


def is_mask_key(secret: bytes, public: bytes) -> bool:
    """Whether a secret is the private key, PEM, of a public one."""
    try:
        return public_key_to_bytes(bytes_to_private_key(secret).public_key()) == public
    except ValueError:  # no key at all
        return False


def is_public_key(key: bytes) -> bool:
    """Whether something is a public key, PEM, of the curve that the sites use."""
    try:
        found = bytes_to_public_key(key)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(found, EllipticCurvePublicKey) and isinstance(found.curve, SECP384R1)


def recover(
    shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool]
) -> tuple[bytes | None, set[int]]:
    """A secret out of its shares, and the nodes whose share of it is forged.

    Args:
        shares: By the node that sent it.
        threshold: Shares that bring the secret back.
        fits: Whether something is the secret.

    Returns:
        None if too many are forged to find it.
    """

    def secret_of(nodes: list[int]) -> bytes | None:
        try:
            found: bytes = combine_shares([shares[node] for node in nodes])
        except (ValueError, IndexError):  # no shares of one secret
            return None
        return found if fits(found) else None

    nodes = sorted(shares)
    for start in range(len(nodes)):
        chosen = (nodes[start:] + nodes[:start])[:threshold]
        if len(chosen) == threshold and (secret := secret_of(chosen)) is not None:
            others = set(nodes) - set(chosen)
            return secret, {node for node in others if start and secret_of([*chosen[1:], node]) is None}
    return None, set()


def unmask(
    totals: Mapping[str, np.ndarray], active: set[int], lost: set[int], keys: Mapping[int, Keys],
    secrets: Mapping[int, bytes],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The coordinator's last step: sums of the masked arrays without the masks.

    Args:
        totals: Sums of the arrays of the sites that answered.
        active: Those.
        lost: Sites that made shares but did not answer.
        keys: Public keys of all.
        secrets: Seed of each site that answered, mask key of each that was lost.
    """
    added: list[bytes] = []
    subtracted = [secrets[node] for node in active]
    for node in lost:
        for other in active:
            (subtracted if node > other else added).append(pair_key(secrets[node], keys[other][0]))
    return add_masks(totals, added, subtracted)


def to_fixed(array: np.ndarray, sites: int, limit: float = 0.0) -> np.ndarray:
    """Numbers as integers that add up without rounding.

    Args:
        array: Floats or integers of any shape.
        sites: How many are added.
        limit: Largest absolute value of numbers that travel as 32 bits; 0 for twice 64 bits, with a limit of `WIDE`.

    Returns:
        uint32 of the array's shape, rounded to `step`; or uint64 with a first axis of two, whole steps and the finer
        ones of what they leave, which is all that float64 holds. Negative numbers are their two's complement.

    Raises:
        Refused: A number is beyond the limit, or NaN. Clipping it would falsify the sum without a word.
    """
    array = np.asarray(array, np.float64)
    if not (np.abs(array) < (limit or WIDE)).all():
        raise Refused(
            f"a number is NaN or not below {limit or WIDE:g}, which secure sums can carry",
            todo="raise secure_range for larger updates, or lower the learning rate",
        )  # fmt: skip
    if limit:
        return np.rint(array / step(sites, limit)).astype(np.int64).astype(np.uint32)
    coarse = np.rint(array / step(sites))
    fine = np.rint((array - coarse * step(sites)) / _fine(sites))
    return np.stack([coarse, fine]).astype(np.int64).astype(np.uint64)


def from_fixed(array: np.ndarray, sites: int, limit: float = 0.0) -> np.ndarray:
    """The sum as float64 again; arguments as for `to_fixed`."""
    if limit:
        return array.view(np.int32) * step(sites, limit)
    coarse, fine = array.view(np.int64)
    return coarse * step(sites) + fine * _fine(sites)


def step(sites: int, limit: float = 0.0) -> float:
    """What one unit of `to_fixed` is: a power of two where the limit is one; the sum of all sites fits."""
    room = 2.0 ** math.ceil(math.log2(sites))
    return (limit or WIDE) * room / 2.0 ** (30 if limit else 62)


def _fine(sites: int) -> float:
    return step(sites) * step(sites) / WIDE
