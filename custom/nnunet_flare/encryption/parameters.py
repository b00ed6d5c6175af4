"""Parameters of the BFV scheme (Brakerski 2012; Fan and Vercauteren, ePrint 2012/144), and how many sites they bear.

Ring degree 4096, ciphertext modulus of one 60-bit prime (a second one of 40 bits belongs to SEAL's key switching,
which is never used), ternary secret, noise of standard deviation 3.2. The standard of HomomorphicEncryption.org
(2018, table 1) allows 109 bits of modulus at this degree for 128 bits of security; these are 100.

Only fresh ciphertexts are added, one of each site. Noise of a fresh one is at most 21, so that decryption of a sum of K
is exact while 21 K < q / 2t: 512 for a 50-bit plain modulus t, 2048 for a 48-bit one.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_flare.errors import ConfigError

__all__ = ["MOST_SITES", "PARAMETERS", "Parameters"]

DEGREE = 4096
COEFFICIENT_BITS = (60, 40)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One parameter set: two signed fields of ``field_bits`` in each slot but the first, which is the mark's.

    Args:
        field_bits: Of a value, its sign included.
        max_sites: Whose vectors may be added.
    """

    field_bits: int
    max_sites: int

    @property
    def id(self) -> str:
        return f"bfv-{DEGREE}-60-{self.plain_bits}"

    @property
    def plain_bits(self) -> int:
        """Bits of the plain modulus: two fields fill a slot."""
        return 2 * self.field_bits

    @property
    def values_per_ciphertext(self) -> int:
        return 2 * (DEGREE - 1)

    @classmethod
    def for_sites(cls, number: int) -> Parameters:
        """The widest fields that bear so many sites.

        Raises:
            ConfigError: too many for any set.
        """
        for parameters in PARAMETERS.values():
            if number <= parameters.max_sites:
                return parameters
        raise ConfigError(
            field="encryption",
            expected=f"{MOST_SITES} sites at most, for the sum of more could not be decrypted",
            found=f"{number}",
            remedy="form fewer, larger sites, or train without encryption",
        )


PARAMETERS = {
    item.id: item for item in (Parameters(field_bits=25, max_sites=23), Parameters(field_bits=24, max_sites=95))
}
MOST_SITES = 95
